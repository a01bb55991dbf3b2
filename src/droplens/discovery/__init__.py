"""Find every stochastic site of a model, by module and function."""

from droplens.discovery._calls import Call
from droplens.discovery._composites import RECURRENT
from droplens.discovery._guard import KEPT_IN_EVAL, guarded, switch_on
from droplens.discovery._intercept import intercept, switched
from droplens.discovery._order import check_apart, picks_rows
from droplens.discovery._registry import register_site
from droplens.discovery._sites import Site, site_of, sites
from droplens.discovery._tracker import is_hooked
from droplens.discovery._unrolled import can_unroll, unrolled

__all__ = [
    "KEPT_IN_EVAL",
    "RECURRENT",
    "Call",
    "Site",
    "can_unroll",
    "check_apart",
    "guarded",
    "intercept",
    "is_hooked",
    "picks_rows",
    "register_site",
    "site_of",
    "sites",
    "switch_on",
    "switched",
    "unrolled",
]
