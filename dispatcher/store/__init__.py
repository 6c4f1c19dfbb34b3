"""The record of all pods and containers: what was asked for, what was decided and what came of it."""

from dispatcher.store.codec import SetAside
from dispatcher.store.database import StoreUnusableError
from dispatcher.store.store import Record, Store, Subscriber

__all__ = ["Record", "SetAside", "Store", "StoreUnusableError", "Subscriber"]
