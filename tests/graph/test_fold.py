"""Folding holds the logging of what it calls back, and gives it back as it was."""

import logging

import pytest

from lowbit.graph.fold import quiet


def test_logging_is_on_again_when_the_last_thread_has_left():
    """Two threads, one after the other in and in the same order out: the second found logging off, and left it so."""
    first, second = quiet(), quiet()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logging.root.manager, "disable", 0)
        first.__enter__()
        second.__enter__()
        first.__exit__()
        assert not logging.getLogger("onnx_ir").isEnabledFor(logging.ERROR)
        second.__exit__()
        assert logging.root.manager.disable == 0


def test_what_a_user_turned_off_stays_off():
    logging.disable(logging.CRITICAL)
    try:
        with quiet():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)
