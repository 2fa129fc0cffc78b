"""Regularizers into networks: places, filling them, and the report of what was placed."""

from medseg_reg.insertion.placement import Placement, measure, place
from medseg_reg.insertion.slots import Slot, slots

__all__ = ["Placement", "Slot", "measure", "place", "slots"]
