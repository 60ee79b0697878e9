"""A Jinja environment in which a hostile chat template cannot reach Python, hang, or fill the memory.

Jinja's `ImmutableSandboxedEnvironment` keeps a template away from Python's internals but lets it run for ever. Here
a `Meter` (template_limits.py) is charged before anything grows or repeats:

* time: every loop turn, call, filter, output and comparison of two variables ticks; the thread's CPU time is limited;
* size: every operation that makes text or containers is charged what it makes, *before* it makes it where the size
  can be a product ('a' * 10**9, replace, join, center, format, indent, batch, slice, ...);
* shape: a container's expanded weight (shared parts counted as often as they occur) and its depth are limited, so
  that no single step inside C (str, ==, hash, tojson) can explode on `x = [x, x]` repeated.

Whatever a normal template does comes out byte for byte as transformers renders it; filters that no chat template
needs and that cost more than linear time (striptags, urlize, wordwrap, pprint, xmlattr, ...) are absent, as are
`include`, `import`, `extends` and `autoescape`. The tests in tests/data/test_chat_template.py attack all of this.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pronghorn.data.template_limits import BOUNDED_FILTERS, LimitError, Meter, tojson

MAX_TEMPLATE_CHARS = 128 * 1024  # the longest published templates have about 25,000
MAX_TEMPLATE_TOKENS = 15_000

# fmt: off
_FILTERS = frozenset((
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower",
    "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select",
    "selectattr", "slice", "sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique",
    "upper", "urlencode", "wordcount",
))
_STR_METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map",
    "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower",
    "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition",
    "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill",
))
# fmt: on
_METHODS: dict[type, frozenset[str]] = {
    str: _STR_METHODS,
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
_NO_METHODS = (int, float, complex, bytes, bytearray, range, set, frozenset, types.GeneratorType)


class SafeNamespace(Namespace):
    """`namespace()` without private names. Printed as a constant: it alone can change, so it may hold itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            SafeNamespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        SafeNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the namespace attribute {name!r} starts with an underscore")


class SafeDict:
    """`dict(...)` and `dict.fromkeys(...)` without the type behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class GuardExtension(Extension):
    """The functions that `GuardNodes` writes into a template, and the `{% generation %}` tag."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class)
    environment: "TemplateEnvironment"

    def tick(self, value: Any = None) -> Any:
        self.environment.meter.tick()
        return value

    def made(self, value: Any) -> Any:
        return self.environment.meter.account(value)

    def concat(self, *values: Any) -> str:
        self.environment.meter.tick()
        texts = [str(value) for value in values]
        self.environment.meter.charge(sum(map(len, texts)))
        return "".join(texts)

    def generation(self, caller: Callable[[], str]) -> str:
        text = caller()
        start = self.environment.emitted_chars
        self.environment.generation_spans.append((start, text))
        return text

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generation"), [], [], body).set_lineno(line)


class GuardNodes(NodeTransformer):
    """Writes ticks and size checks into a parsed template."""

    forbidden = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.EvalContextModifier)

    def __init__(self, guard: GuardExtension) -> None:
        self.guard = guard

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, self.forbidden):
            raise SecurityError(f"{type(node).__name__.lower()} at line {node.lineno} is not allowed")
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(self.guard.call_method("tick"), lineno=node.lineno)
        node.body.insert(0, tick)
        if node.test is not None:  # "for x in y if test": turns that are skipped take time too
            test: nodes.Expr = node.test  # type: ignore[assignment]
            node.test = self.guard.call_method("tick", [test], lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        # A constant goes through `finalize`, where it is paid for, only as an expression.
        node.nodes = [
            nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self.guard.call_method("concat", node.nodes, lineno=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if not any(isinstance(side, nodes.Const) for side in sides):
            node.expr = self.guard.call_method("tick", [node.expr], lineno=node.lineno)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._container(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return node if node.ctx != "load" else self._container(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._container(node)

    def _container(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        constant = not any(True for _ in node.find_all((nodes.Name, nodes.Call, nodes.Filter, nodes.BinExpr)))
        self.generic_visit(node)
        return node if constant else self.guard.call_method("made", [node], lineno=node.lineno)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; renders one conversation at a time (`meter` belongs to the current one)."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, strftime_now: Callable[[str], str]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GuardExtension, loopcontrols],
            optimized=False,  # nothing of a template runs while it is compiled
        )
        self.meter = Meter()
        self.guard: GuardExtension = self.extensions[GuardExtension.identifier]  # type: ignore[assignment]
        self.finalize = _finalize
        self.emitted_chars = 0
        self.generation_spans: list[tuple[int, str]] = []
        self.filters = {
            name: self._guarded(self.filters[name], BOUNDED_FILTERS.get(name)) for name in _FILTERS
        }
        self.filters["tojson"] = functools.partial(tojson, self.meter)
        self.tests = {name: self._guarded(cast(Callable, test)) for name, test in self.tests.items()}
        self.globals.pop("lipsum")
        self.globals["dict"] = SafeDict()
        self.globals["namespace"] = SafeNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: strftime_now(self.meter.short(format, 256))

    def compile_guarded(self, source: str) -> Any:
        """A jinja2 Template of `source` with ticks and checks in it. Raises what jinja2 raises, or LimitError."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise LimitError(f"it has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
        for count, _ in enumerate(self.lex(source)):
            if count > MAX_TEMPLATE_TOKENS:
                raise LimitError("it has too many parts")
        return self.from_string(GuardNodes(self.guard).visit(self.parse(source)))

    def _guarded(self, function: Callable, bounded: Callable | None = None) -> Callable:
        @functools.wraps(function)  # carries jinja2's mark of what a filter wants passed
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            result = bounded(self.meter, function, *args, **kwargs) if bounded else function(*args, **kwargs)
            return self.meter.account(result)

        return guarded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if not callable(value):
            return True
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        return not isinstance(obj, _NO_METHODS)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("_"):  # jinja2 would print nothing for it and go on
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")
        return super().unsafe_undefined(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template = value.__self__

        def limited(*args: Any, **kwargs: Any) -> str:
            self.meter.charge_format(template, (args, kwargs))
            return wrapped(*args, **kwargs)

        return limited

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if owner is __self.guard:
            for scope in (
                "_loop_vars",
                "_block_vars",
            ):  # what the compiler adds for functions that see the context
                kwargs.pop(scope, None)
            return __obj(*args, **kwargs)
        __self.meter.tick()
        if isinstance(owner, str):
            args = __self._check_str_method(owner, __obj.__name__, args, kwargs)
        return __self.meter.account(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.tick()
        if operator == "+" and type(left) is str and type(right) is str:
            meter.charge(len(left) + len(right))
            return left + right
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    meter.charge(len(one) * max(other, 0))
            if (
                isinstance(left, int)
                and isinstance(right, int)
                and left.bit_length() + right.bit_length() > 8192
            ):
                raise LimitError("a number grows too large")
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 8192:
                raise LimitError("a number grows too large")
        elif operator == "%" and isinstance(left, str):
            meter.charge_percent(left, right)
        elif operator == "+" and isinstance(left, str | list | tuple) and hasattr(right, "__len__"):
            meter.charge(len(left) + len(right))
            return self._weighed(super().call_binop(context, operator, left, right))
        result = super().call_binop(context, operator, left, right)
        return self._weighed(result) if isinstance(result, list | tuple) else result

    def _weighed(self, value: Any) -> Any:
        self.meter.weigh(value)
        return value

    def _check_str_method(self, text: str, name: str, args: tuple, kwargs: dict) -> tuple:
        """Pay for what a method of `text` is about to make; returns its arguments."""
        if name in ("center", "ljust", "rjust", "zfill") and args:
            self.meter.width(args[0])
        elif name == "expandtabs":
            tab = self.meter.width(next(iter((*args, *kwargs.values())), 8))
            self.meter.charge(len(text) + text.count("\t") * abs(tab))
        elif name == "replace" and len(args) >= 2:
            self.meter.charge_replace(text, args[0], args[1])
        elif name == "join" and args:
            parts = list(self.meter.each(args[0]))
            self.meter.charge(len(text) * len(parts) + self.meter.total_weight(parts))
            args = (parts,)
        return args


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """What an output statement prints: paid for before it is kept."""
    meter = context.environment.meter  # type: ignore[attr-defined]
    meter.tick()
    text = value if isinstance(value, str) else str(value)
    meter.charge(len(text))
    return text


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message)[:500])
