"""A load balancer for HTTP and TCP. Modules import from lower floors only; `tests/test_floors.py` has the table."""

from balancer.embedding import LoadBalancer
from balancer.version import __version__

__all__ = ["LoadBalancer", "__version__"]
