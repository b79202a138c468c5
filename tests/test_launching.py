"""What starts a process is found wherever the call is; what does not is left in the fast lane."""

import os
import subprocess
from subprocess import run

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import _launches
from ranks import start_ranks


def itself():
    subprocess.run(["true"])


def by_a_name():
    run(["true"])


def by_a_helper():
    start_ranks(None)


def by_a_helper_of_its_own():
    return [by_a_name for _ in range(2)]


def in_a_function_within():
    def within():
        return subprocess.Popen(["true"])

    return within


class Starter:
    def go(self):
        return itself()


def by_a_method():
    Starter().go()


@given(st.integers())
def at_random(number):
    itself()


def not_at_all():
    return os.getpid(), pytest.approx(1)


STARTING = [itself, by_a_name, by_a_helper, by_a_helper_of_its_own, in_a_function_within]
STARTING += [by_a_method, at_random]


@pytest.mark.parametrize("function", STARTING, ids=lambda function: function.__name__)
def test_a_call_is_found(function):
    assert _launches([function], set())


@pytest.mark.parametrize(
    "function", [not_at_all, len, Starter], ids=lambda function: function.__name__
)
def test_what_starts_nothing_is_not_taken_for_it(function):
    assert not _launches([function], set())
