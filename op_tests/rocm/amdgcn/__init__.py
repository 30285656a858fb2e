"""What would an AMD GPU compute? An interpreter of the compiler's assembly text, for whole kernels.

- `assembly`    text to instructions, labels, directives and argument layout
- `wave`        the registers of a wave, and how operands read and write them
- `scalar`      scalar instructions and branches
- `vector`      vector instructions; `operations` has their functions, `exact` the float arithmetic
- `lanes`       DPP, SDWA and moves between lanes
- `memory`      global memory and LDS with bounds, alignment and race checks; `memory_ops` uses them
- `banks`       how many passes over its banks LDS needs for an access
- `statistics`  what was executed, by instruction and by stretch between barriers
- `trace`       what a wave executed, in order, and the memory that it touched
- `timing`      what that takes on a model of a compute unit
- `machine`     a launch: workgroups, waves, barriers, the initial registers

Knows gfx90a, gfx942 and gfx950 (wave64), gfx1100, gfx1201 and gfx1250 (wave32), as far as this
project's kernels need, and raises `Fault` on whatever it does not know. No caches or hazards; timing is
a replay, of which execution knows nothing.

Rejected: an existing emulator (none covers CDNA3, RDNA3 and RDNA4 in one); decoding binaries, as
the text has the same content and shows in messages what a reader can look up.
"""
