"""Rewards of the GRPO script: what is right, what is named, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from embstore.core.errors import ConfigError
from scripts.kat_rewards import exact_answer_reward, find_reward, format_reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("So she has 5 apples.", "3 + 2 = 5\n#### 5", 1.0),
        ("It is $1,234.00", "#### 1234", 1.0),
        ("10-5 is 5", "#### 5", 1.0),
        ("minus: -3", "-3", 1.0),
        ("first 5, then 6", "#### 5", 0.0),
        ("nothing", "#### 5", 0.0),
        ("The capital is Paris.", "paris", 1.0),
        ("Paris is the capital", "Paris", 0.0),
        ("", "", 0.0),
    ],
)
def test_an_answer_is_right_if_its_last_number_is(completion: str, answer: str, reward: float) -> None:
    assert exact_answer_reward([completion], [answer]) == [reward]
    assert exact_answer_reward([[{"role": "assistant", "content": completion}]], [answer]) == [reward]


def test_the_format_reward_is_the_share_of_words() -> None:
    assert format_reward(['One "two" x3 ::', "all words, here.", ""]) == [0.5, 1.0, 0.0]


def test_a_reward_of_ones_own_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def longest(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = find_reward("my_rewards:longest", [])
    assert not isinstance(reward, str)
    assert reward(completions=["ab", "c"]) == [2.0, 1.0]
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "there is no reward 'nonsense'"),
        ("no_such_module:reward", "cannot be imported"),
        ("json:no_such_function", "cannot be imported"),
        ("json:__name__", "is not a function but str"),
        ("exact-answer", "reads the column answer, but the data have chosen, src"),
    ],
)
def test_what_is_no_reward_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_reward(name, ["src", "chosen"])


def test_a_folder_with_a_config_is_a_reward_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_reward(str(tmp_path), []) == str(tmp_path)
