"""Writes golden.txt: random blocks of each format and the float32 values that the PyPI package `gguf` decodes them to.

A line is the format's name, the blocks' bytes, and the values' bits (big-endian), in hexadecimal.

    pip install gguf==0.19.0 && python golden.py > golden.txt
"""

import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Offsets of the half-precision numbers in a block; random bytes there would be infinite or not a number.
HALVES = {
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "Q8_0": [0],
}


def main():
    random = np.random.default_rng(7)
    # The number of elements of each format; both block sizes divide it.
    n_elements = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    for name, offsets in HALVES.items():
        quant_type = GGMLQuantizationType[name]
        block_size, block_bytes = GGML_QUANT_SIZES[quant_type]
        n_blocks = n_elements // block_size
        blocks = random.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
        for offset in offsets:
            halves = random.normal(0, 0.02, n_blocks).astype("<f2")
            blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(n_blocks, 2)
        values = dequantize(blocks, quant_type).astype(">f4")
        print(name, blocks.tobytes().hex(), values.tobytes().hex())


main()
