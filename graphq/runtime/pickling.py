"""What stands in place of pickle for objects whose graph would lose its source: ``torch.fx`` writes a graph's code."""

import copy
from typing import Any, NoReturn, Self


class NotPickled:
    """An object that can be copied, deeply or not, and that pickle refuses: with it ``torch.save``, and processes."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: write what graphq.compile returns with its save(path), and"
            " read it with graphq.load(path); a state dict can be pickled"
        )

    def __copy__(self) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made
