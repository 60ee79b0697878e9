"""The dynamic 8-bit maps of bitsandbytes, to the bit: fp32 values, little endian, in hex.

A decade a step of the leading bits, and within the decade as many even steps as the remaining bits count. Hex and not
that formula, because it does not say enough: `numpy.linspace` in its construction gives 50 of 256 entries another last
bit than the library's own build.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, section 2.1,
https://arxiv.org/abs/2110.02861.
"""

import numpy as np


def table_from_hex(text: str) -> np.ndarray:
    """The fp32 values, little endian, that `text` spells; read-only."""
    table = np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)
    table.flags.writeable = False
    return table


def midpoints(sorted_table: np.ndarray) -> np.ndarray:
    """fp32 `[entries - 1]`: where the nearest entry changes. A value on a midpoint belongs to the lower entry."""
    return (sorted_table[:-1] + sorted_table[1:]) / np.float32(2)


# The dynamic map with a sign: ascending, entry 127 is 0, from -0.993 to 1. Nested absmax, and 8-bit first moments.
DYNAMIC_SIGNED = table_from_hex(
    "33337ebf9a997abf000077bf666673bfcdcc6fbf33336cbf9a9968bf000065bf666661bfcdcc5dbf33335abf9a9956bf"
    "000053bf66664fbfcdcc4bbf333348bf9a9944bf000041bf66663dbfcdcc39bf343336bf9a9932bf00002fbf66662bbf"
    "cdcc27bf343324bf9a9920bf00001dbf666619bfcdcc15bf343312bf9a990ebf00000bbf666607bfcccc03bf333300bf"
    "3233f9be0000f2becccceabe9a99e3be6666dcbe3333d5be0000cebeccccc6be9a99bfbe6666b8be3333b1be0000aabe"
    "cccca2be9a999bbe666694be34338dbe000086be99997dbe33336fbecdcc60be666652be000044be9a9935be333327be"
    "cdcc18be66660abe0000f8bd3433dbbd85ebc9bdf728c4bd6766bebdd7a3b8bd48e1b2bdb81eadbd2a5ca7bd9a99a1bd"
    "0ad79bbd7b1496bdeb5190bd5d8f8abdcdcc84bd7b147ebd5d8f72bd3d0a67bd1f855bbd000050bde17a44bdc3f538bd"
    "a3702dbd85eb21bd676616bd48e10abd52b8febc15aee7bcd7a3d0bc9a99b9bc5d8fa2bc1f858bbcc3f568bc48e13abc"
    "643b1fbc180416bccdcc0cbc819503bc6abcf4bbd34de2bb3bdfcfbba470bdbb0d02abbb749398bbdd2486bb8a6c67bb"
    "5c8f42bb2db21dbbfca9f1ba9defa7baff6577ba3ee859ba806a3cbac1ec1eba016f01ba83e2c7b905e78cb90bd723b9"
    "4b1fbab8b3ef8ab8348037b80642b2b7ff0502b7941a5ab6b7a313b500000000b7a31335941a5a36ff0502370642b237"
    "34803738b3ef8a384b1fba380bd7233905e78c3983e2c739016f013ac1ec1e3a806a3c3a3ee8593aff65773a9defa73a"
    "fca9f13a2db21d3b5c8f423b8a6c673bdd24863b7493983b0d02ab3ba470bd3b3bdfcf3bd34de23b6abcf43b8195033c"
    "cdcc0c3c1804163c643b1f3c48e13a3cc3f5683c1f858b3c5d8fa23c9a99b93cd7a3d03c15aee73c52b8fe3c48e10a3d"
    "6766163d85eb213da3702d3dc3f5383de17a443d0000503d1f855b3d3d0a673d5d8f723d7b147e3dcdcc843d5d8f8a3d"
    "eb51903d7b14963d0ad79b3d9a99a13d2a5ca73db81ead3d48e1b23dd7a3b83d6766be3df728c43d85ebc93d3433db3d"
    "0000f83d66660a3ecdcc183e3333273e9a99353e0000443e6666523ecdcc603e33336f3e99997d3e0000863e34338d3e"
    "6666943e9a999b3ecccca23e0000aa3e3333b13e6666b83e9a99bf3eccccc63e0000ce3e3333d53e6666dc3e9a99e33e"
    "ccccea3e0000f23e3233f93e3333003fcccc033f6666073f00000b3f9a990e3f3433123fcdcc153f6666193f00001d3f"
    "9a99203f3433243fcdcc273f66662b3f00002f3f9a99323f3433363fcdcc393f66663d3f0000413f9a99443f3333483f"
    "cdcc4b3f66664f3f0000533f9a99563f33335a3fcdcc5d3f6666613f0000653f9a99683f33336c3fcdcc6f3f6666733f"
    "0000773f9a997a3f33337e3f0000803f"
)
# Without a sign: entry 0 is 0, up to 1. 8-bit second moments.
DYNAMIC_UNSIGNED = table_from_hex(
    "00000000aa7bae3498095035389b0e36f6cc9236514cde36d5e514376e128337a071e13768e81f3800184f389a477e38"
    "99bb96386453ae3831ebc5384b590639ca54413949507c39e4a59b39a223b93963a1d639221ff43971ce083a508d173a"
    "304c263a100b353aefc9433ad088523aaf47613a8e06703a6ec57e3a0681953a355eba3a643bdf3a4a0c023be17a143b"
    "78e9263b1058393ba7c64b3b40355e3bd7a3703b3789813b82c08a3bcff7933b1a2f9d3b6666a63bb29daf3bfdd4b83b"
    "4a0cc23b9543cb3be17ad43b2eb2dd3b78e9e63bc520f03b0f58f93bae47013c54e3053cf97e0a3ca01a0f3c45b6133c"
    "eb51183c92ed1c3c3789213c2a5c2f3c6766463ca3705d3ce27a743c8fc2853caf47913ccdcc9c3ceb51a83c0bd7b33c"
    "295cbf3c47e1ca3c6766d63c87ebe13ca370ed3cc3f5f83c703d023d0000083d8fc20d3d1f85133daf47193d3d0a1f3d"
    "cdcc243d5c8f2a3deb51303d7b14363d0ad73b3d9a99413d285c473db81e4d3d47e1523dd7a3583d67665e3df728643d"
    "87eb693d15ae6f3da370753d33337b3de27a803d2a5c833d713d863db81e893d00008c3d48e18e3d90c2913dd7a3943d"
    "1f85973d67669a3daf479d3df628a03d3e0aa33d85eba53dcdcca83d15aeab3d5c8fae3da470b13deb51b43d3333b73d"
    "7b14ba3dc3f5bc3d0bd7bf3d52b8c23d9a99c53de27ac83d295ccb3d0000d43d6666e23dcdccf03d3333ff3dcccc063e"
    "00000e3e3433153e66661c3e9a99233ecccc2a3e0000323e3433393e6666403e9a99473ecccc4e3e0000563e34335d3e"
    "6666643e9a996b3ecccc723e00007a3e9999803e3333843ecdcc873e66668b3e00008f3e9a99923e3333963ecccc993e"
    "66669d3e0000a13e9a99a43e3333a83eccccab3e6666af3e0000b33e9a99b63e3333ba3eccccbd3e6666c13e0000c53e"
    "9a99c83e3333cc3ecccccf3e6666d33e0000d73e9a99da3e3333de3ecccce13e6666e53e0000e93e9a99ec3e3333f03e"
    "ccccf33e6666f73e0000fb3e9999fe3e9a19013f66e6023f33b3043f0080063fcc4c083f9a190a3f66e60b3f34b30d3f"
    "00800f3fcd4c113f9a19133f66e6143f34b3163f0080183fcd4c1a3f9a191c3f66e61d3f34b31f3f0080213fcd4c233f"
    "9a19253f66e6263f34b3283f00802a3fcd4c2c3f9a192e3f66e62f3f34b3313f0080333fcd4c353f9a19373f66e6383f"
    "34b33a3f00803c3fcd4c3e3f9a19403f66e6413f34b3433f0080453fcc4c473f9a19493f66e64a3f34b34c3f00804e3f"
    "cc4c503f9a19523f66e6533f34b3553f0080573fcc4c593f9a195b3f66e65c3f34b35e3f0080603fcc4c623f9a19643f"
    "66e6653f34b3673f0080693fcc4c6b3f9a196d3f66e66e3f34b3703f0080723fcc4c743f9a19763f66e6773f34b3793f"
    "00807b3fcc4c7d3f9a197f3f0000803f"
)
DYNAMIC_SIGNED_MIDPOINTS = midpoints(DYNAMIC_SIGNED)
DYNAMIC_UNSIGNED_MIDPOINTS = midpoints(DYNAMIC_UNSIGNED)
