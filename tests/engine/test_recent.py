"""RecentTexts and what tenants share: drafts of the own texts, and nothing of another tenant's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from model.batch import Batch, StepOutput
from service.engine import drafting
from service.engine.drafting import Grade, TenantDrafts, Tenants, Track
from service.engine.plan import EngineConfig
from service.engine.recent import ORDER, RecentTexts
from tests.engine.harness import Rig, costs, make_request, renamed
from tests.support.fakes import OracleRunner

CONFIG = EngineConfig(max_batch_tokens=64, max_sequences=6, target_gap=10.0, prefix_cache=False)


def slow_drafts(texts: list[list[int]], tokens: list[int], most: int) -> list[int]:
    """The twin: looks for the newest place of the last tokens, one draft at a time."""
    found: list[int] = []
    while len(found) < most:
        context = [*tokens, *found][-ORDER:]
        after = [
            text[end]
            for text in texts
            for end in range(ORDER, len(text))
            if text[end - ORDER : end] == context
        ]
        if not after:
            break
        found.append(after[-1])
    return found


@pytest.mark.parametrize("seed", range(30))
def test_drafts_are_what_followed_last(seed: int) -> None:
    """However many tokens were read at a time, and whichever text they are of."""
    draw = random.Random(seed)
    recent, texts = RecentTexts(), []
    for _ in range(4):
        text = [draw.randrange(4) for _ in range(draw.randint(0, 60))]
        read = 0
        while read < len(text):
            end = min(len(text), read + draw.randint(1, 9))
            recent.read(text[:end], read)
            read = end
        texts.append(text)
        for _ in range(10):
            last = [draw.randrange(4) for _ in range(draw.randint(0, 6))]
            most = draw.randrange(9)
            wanted = slow_drafts(texts, last, most) if len(last) >= ORDER else []
            assert recent.drafts(last, most) == wanted


def test_a_table_does_not_grow_and_keeps_the_newest() -> None:
    draw = random.Random(0)
    recent = RecentTexts(entries=256)
    size = len(recent._table)
    for _ in range(20):
        text = [draw.randrange(50_000) for _ in range(5000)]
        recent.read(text, 0)
        assert len(recent._table) == size
        assert recent.drafts(text[-ORDER - 1 : -1], 1) == text[-1:]


def test_tenants_are_bounded_and_the_least_active_is_dropped() -> None:
    tenants = Tenants()
    first = tenants.get("0")
    for number in range(1, 2 * drafting.MOST_TENANTS):
        tenants.get(str(number))
        assert tenants.get("0") is first
    assert len(tenants) == drafting.MOST_TENANTS
    assert tenants.get("1") is not first


# --- in the engine ----------------------------------------------------------------------------
class Reciter(OracleRunner):
    """Its outputs depend on the last token alone: each token has one successor, drawn once."""

    successors = random.Random(5).sample(range(90), 90)

    def run(self, batch: Batch) -> StepOutput:
        output = super().run(batch)
        last = batch.tokens_T[batch.sample_rows_R]
        output.tokens_R[:] = [self.successors[token % 90] for token in last.tolist()]
        return output


def accepted(tenants: list[str]) -> int:
    """Accepted drafts of the last of some requests, one after another, that have equal texts."""
    rig = Rig(CONFIG, kind=Reciter, cost=costs(lambda rows: 0.01 + rows * 1e-6), num_blocks=64)
    request = make_request(prompt=[3], max_tokens=30, ignore_eos=True)
    for number, tenant in enumerate(tenants):
        before = rig.total("num_accepted")
        rig.run(replace(renamed(request, f"r{number}"), tenant=tenant))
    return rig.total("num_accepted") - before


def test_a_tenant_s_texts_help_its_next_request_and_no_other_s() -> None:
    alone = accepted(["a"])
    assert accepted(["a", "a"]) > alone + 15
    assert accepted(["b", "a"]) == accepted(["b", "b", "c", "a"]) == alone


def test_chances_of_one_tenant_are_not_those_of_another() -> None:
    tenants = Tenants()
    track = Track(tenants.get("a"), None)
    track.grade = Grade.OWN_2
    before = Track(tenants.get("b"), None).chance(Grade.OWN_2)
    for _ in range(20):
        track.learn(4, 0, at=0)
    assert Track(tenants.get("a"), None).chance(Grade.OWN_2) < before / 2
    assert Track(tenants.get("b"), None).chance(Grade.OWN_2) == before


# --- the account ------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_what_drafts_lose_is_bounded(seed: int) -> None:
    """Whatever the chances say, if a draft costs what it was expected to."""
    draw = random.Random(seed)
    track = Track(TenantDrafts(), None)
    net, tries = 0.0, 0
    for num_output in range(3000):
        grade, price = draw.choice(list(Grade)), draw.choice([0.02, 0.2, 0.7, 1.0])
        num = track.most_drafts(grade, num_output=num_output, price=price)
        if num and draw.random() < 0.5:
            num = draw.randint(1, num)
            hits = draw.choice([0] * 19 + [min(num, 2)])
            track.grade = grade
            track.learn(num, hits, at=0)
            track.pay(num * price)
            net, tries = net + hits - num * price, tries + 1
        assert net >= -(0.7 + drafting.INTEREST * num_output) - 1e-9
    assert tries > 20


def test_a_sequence_whose_drafts_fail_is_left_alone_and_tried_again() -> None:
    track = Track(TenantDrafts(), None)
    tries = []
    for num_output in range(2000):
        if track.most_drafts(Grade.OWN_2, num_output=num_output, price=0.15):
            tries.append(num_output)
            track.learn(1, 0, at=0)
            track.pay(0.15)
    assert 20 < len(tries) < 0.04 * 2000
    assert tries[-1] > 1900
    for num_output in range(2000, 2100):
        if num := track.most_drafts(Grade.OWN_2, num_output=num_output, price=0.15):
            track.learn(num, num, at=0)
            track.pay(0.15 * num)
    assert track.most_drafts(Grade.OWN_2, num_output=2100, price=0.15) > 15
