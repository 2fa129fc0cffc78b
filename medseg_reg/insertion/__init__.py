"""Regularizers into networks: the places of any network, filling them, and the report of it."""

from medseg_reg.insertion.insert import insert, inserted, remove
from medseg_reg.insertion.narrow import narrow
from medseg_reg.insertion.placement import measure, place
from medseg_reg.insertion.places import Place, find_places
from medseg_reg.insertion.report import Placement, PlacementReport
from medseg_reg.insertion.slots import Slot, slots

__all__ = [
    "Place",
    "Placement",
    "PlacementReport",
    "Slot",
    "find_places",
    "insert",
    "inserted",
    "measure",
    "narrow",
    "place",
    "remove",
    "slots",
]
