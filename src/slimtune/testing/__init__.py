"""The conformance suite as code: run it on any method, your own too. It needs the packages of the `dev` extra."""

from slimtune.testing.cases import CASES, Case
from slimtune.testing.properties import COMPILED, PROPERTIES
from slimtune.testing.subject import Subject
from slimtune.testing.suite import Check, check_method, checks

__all__ = ["CASES", "COMPILED", "PROPERTIES", "Case", "Check", "Subject", "check_method", "checks"]
