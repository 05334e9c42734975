"""Imports what the `trl` engine needs, in its order, for a nursery whose children train by it."""

from importlib import import_module

from luthier.training.trl.start import import_libraries

import_libraries()
import_module("luthier.training.trl.engine")
import_module("luthier.training.trl.job")
