"""e4m3 by its bits, so that every device gives the same: those before compute capability 8.9 do not convert it."""

import triton
import triton.language as tl


@triton.jit
def widen(codes):
    """fp32 of e4m3 bytes, exact, denormal numbers and NaN too."""
    bits = codes.to(tl.int32)
    magnitude = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^(127 - 7)
    magnitude = tl.where((bits & 127) == 127, float("nan"), magnitude)
    return tl.where(bits >= 128, -magnitude, magnitude)


@triton.jit
def narrow(values):
    """The e4m3 bytes nearest to fp32 values, ties to even; ±448 for what is larger, NaN for NaN."""
    size = tl.minimum(tl.abs(values), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # To three bits behind the leading one, with a carry into the exponent, whose bias is 7 instead of 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Numbers below 2^-6 are multiples of 2^-9, which is the last bit of 2^14 in fp32.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(values != values, 127, code)
    return (code | ((values.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)
