"""How torch says that memory is out, said our way; and the most that was held."""

from __future__ import annotations

import torch

from luthier.engines.surroundings import peak_of_this_process
from luthier.engines.verbs import OutOfMemory

_CPU_OUT_OF_MEMORY = "can't allocate memory"


class memory_errors:  # noqa: N801 (read as a statement)
    """Turns the ways in which torch says that memory is out into ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        is_out = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error)
        )
        if is_out:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemory(str(error).splitlines()[0]) from None


def find_peak_bytes(device: torch.device) -> int:
    """The most this process has held: of the device, or of the machine's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_of_this_process()
