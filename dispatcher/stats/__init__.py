"""Measuring pods and containers, for every runtime alike. What CRI makes of the figures is in `dispatcher.cri`."""

from dispatcher.stats.filesystems import Filesystem
from dispatcher.stats.meter import ContainerFigures, Meter, PodFigures

__all__ = ["ContainerFigures", "Filesystem", "Meter", "PodFigures"]
