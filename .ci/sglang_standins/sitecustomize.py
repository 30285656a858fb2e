"""Lets torchvision load beside a CPU build of PyTorch, for which its wheel has no `torchvision::nms`.

SGLang imports torchvision for image models. Python imports this module in every process, the engine's
children among them; the two operators are defined right before torchvision is imported.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision":
            import torch

            sys.meta_path.remove(self)
            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.library.define(
                    f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor"
                )


before_torchvision = _BeforeTorchvision()
sys.meta_path.insert(0, before_torchvision)
