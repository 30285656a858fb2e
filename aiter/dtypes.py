"""Short names of the torch dtypes, as aiter programs spell them.

`from aiter import dtypes; dtypes.bf16` is `torch.bfloat16`: these are aliases, not types of our own.
"""

import torch

fp64 = torch.float64
fp32 = torch.float32
fp16 = torch.float16
bf16 = torch.bfloat16
fp8 = torch.float8_e4m3fn
i64 = torch.int64
i32 = torch.int32
i16 = torch.int16
i8 = torch.int8
u8 = torch.uint8
