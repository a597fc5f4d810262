"""Rollouts: what is sampled is the model's distribution, whatever stands beside it in the batch."""

import functools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.tiny import policy, probe_policy
from ueba_helpers.data.seeding import generator
from ueba_helpers.errors import UserError
from ueba_helpers.rl import rollouts
from ueba_helpers.rl.prefix import backbone_of, plain_states, token_log_probs
from ueba_helpers.rl.rollouts import (
    Completions,
    generate,
    pad_left,
    pad_right,
    predict,
    risk_scores,
    tokenize_prompts,
)
from ueba_helpers.task.verdicts import RISKS, render_verdict

PROMPTS = [[5, 9, 40], [5, 9, 40], [100, 7, 8, 9, 60, 61, 33], [12], [200, 201]]
PAD_ID = 0
NEVER = [-1]  # no token ends a completion


@pytest.fixture
def sharp():
    """A model whose next token depends on what it has read: an untrained one is nearly uniform."""
    model, tokenizer = policy()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model.eval(), tokenizer


def complete(model, prompts, *, tokens=6, uniforms=None, temperature=1.0, ends=NEVER):
    return generate(model, prompts, max_new_tokens=tokens, eos_token_ids=ends,
                    pad_token_id=PAD_ID, temperature=temperature, uniforms=uniforms)


def uniforms_for(prompts, tokens=6, seed=0):
    return generator(seed, "test uniforms").random((len(prompts), tokens))


# -- neighbours and padding -----------------------------------------------------------------------

def stands_alone(model, prompts, uniforms, rearrange):
    """Compare each row of a rearranged batch with the row generated on its own."""
    rows = rearrange(list(range(len(prompts))))
    batch = complete(model, [prompts[i] for i in rows], uniforms=uniforms[rows])
    for k, i in enumerate(rows):
        alone = complete(model, [prompts[i]], uniforms=uniforms[i:i + 1])
        assert batch.ids[k] == alone.ids[0]
        assert np.allclose(batch.log_probs[k], alone.log_probs[0], atol=1e-5)


REARRANGEMENTS = {
    "as given": lambda rows: rows, "reversed": lambda rows: rows[::-1],
    "a part": lambda rows: rows[1:4], "groups torn apart": lambda rows: [0, 2, 1, 4, 3],
}


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_a_completion_does_not_depend_on_its_neighbours(name, sharp):
    stands_alone(sharp[0], PROMPTS, uniforms_for(PROMPTS), REARRANGEMENTS[name])


def test_the_comparison_with_neighbours_can_fail(sharp, monkeypatch):
    def maskless(rows, pad_id, device="cpu"):
        ids, mask = pad_left(rows, pad_id, device)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(rollouts, "pad_left", maskless)
    with pytest.raises(AssertionError):
        stands_alone(sharp[0], PROMPTS, uniforms_for(PROMPTS), REARRANGEMENTS["as given"])


def test_a_row_that_ends_leaves_the_others_as_they_were(sharp):
    uniforms = uniforms_for(PROMPTS, 8)
    whole = complete(sharp[0], PROMPTS, tokens=8, uniforms=uniforms)
    end = whole.ids[2][1]
    cut = complete(sharp[0], PROMPTS, tokens=8, uniforms=uniforms, ends=[end])
    assert len(cut.ids[2]) == 2 and cut.ids[2][-1] == end
    for short, long, values in zip(cut.ids, whole.ids, cut.log_probs, strict=True):
        stop = long.index(end) + 1 if end in long else 8
        assert short == long[:stop] and len(values) == stop
    assert any(len(ids) == 8 for ids in cut.ids), "some rows went on after the first had ended"


def test_other_uniforms_give_other_completions(sharp):
    first = complete(sharp[0], PROMPTS, uniforms=uniforms_for(PROMPTS))
    same = complete(sharp[0], PROMPTS, uniforms=uniforms_for(PROMPTS))
    other = complete(sharp[0], PROMPTS, uniforms=uniforms_for(PROMPTS, seed=1))
    assert first == same and first.ids != other.ids
    assert first.ids[0] != first.ids[1], "equal prompts, different numbers"


def test_generation_leaves_the_mode_and_the_random_state_as_they_were(sharp):
    model = sharp[0].train()
    state = torch.random.get_rng_state()
    complete(model, PROMPTS, uniforms=uniforms_for(PROMPTS))
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert not any(p.grad is not None for p in model.parameters())


# -- greedy decoding ------------------------------------------------------------------------------

def by_transformers(model, prompts, tokens, end):
    ids, mask = pad_left(prompts, PAD_ID)
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, do_sample=False,
                               max_new_tokens=tokens, eos_token_id=end, pad_token_id=PAD_ID)
    rows = found[:, ids.size(1):].tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


def test_greedy_decoding_equals_that_of_transformers(sharp):
    model = sharp[0]
    expected = by_transformers(model, PROMPTS, 10, end=511)
    assert complete(model, PROMPTS, tokens=10, ends=[511]).ids == expected
    assert len({tuple(row) for row in expected}) == 4, "each distinct prompt has its own answer"
    end = expected[2][3]
    stopped = by_transformers(model, PROMPTS, 10, end=end)
    assert complete(model, PROMPTS, tokens=10, ends=[end]).ids == stopped != expected


def test_uniforms_of_another_shape_are_refused(sharp):
    with pytest.raises(ValueError, match=r"\(5, 6\)"):
        complete(sharp[0], PROMPTS, uniforms=uniforms_for(PROMPTS[:2]))


# -- sampled frequencies --------------------------------------------------------------------------

def first_token_probabilities(model, prompt, temperature):
    ids, mask = pad_left([prompt], PAD_ID)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[0, -1]
    return (logits.double() / temperature).softmax(-1).numpy()


def p_value(counts, probabilities):
    """Return the chi-square p-value; tokens expected less than five times count as one."""
    total = counts.sum()
    often = probabilities * total >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(probabilities[often], probabilities[~often].sum()) * total
    keep = expected > 0
    return chisquare(observed[keep], expected[keep] * observed[keep].sum()
                     / expected[keep].sum()).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_frequencies_are_the_models_probabilities(temperature):
    model, _ = policy()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.eval()
    prompt, rows = PROMPTS[2], 10_000
    done = complete(model, [prompt] * rows, tokens=1, temperature=temperature,
                    uniforms=generator(1, "frequencies").random((rows, 1)))
    vocabulary = model.config.vocab_size
    counts = np.bincount([ids[0] for ids in done.ids], minlength=vocabulary)
    assert p_value(counts, first_token_probabilities(model, prompt, temperature)) > 1e-3
    for broken in (temperature * 1.3, temperature / 1.3):
        assert p_value(counts, first_token_probabilities(model, prompt, broken)) < 1e-6
    rolled = np.roll(counts, 1)
    assert p_value(rolled, first_token_probabilities(model, prompt, temperature)) < 1e-6


def test_the_second_token_follows_the_first():
    """Joint frequencies of two tokens over the eleven-word vocabulary."""
    model, _ = probe_policy()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.eval()
    rows, words = 20_000, model.config.vocab_size
    done = complete(model, [[7, 8]] * rows, tokens=2,
                    uniforms=generator(2, "frequencies").random((rows, 2)))
    joint = np.zeros((words, words))
    for first in range(words):
        after = first_token_probabilities(model, [7, 8, first], 1.0)
        joint[first] = first_token_probabilities(model, [7, 8], 1.0)[first] * after
    pairs = np.array(done.ids)
    counts = np.bincount(pairs[:, 0] * words + pairs[:, 1], minlength=words * words)
    assert p_value(counts, joint.reshape(-1)) > 1e-3
    independent = np.outer(joint.sum(1), joint.sum(0)).reshape(-1)
    assert p_value(counts, independent) < 1e-6, "the broken twin: the first token is not read"


def test_inverting_the_distribution_never_draws_what_cannot_be():
    probabilities = torch.tensor([[0., .25, 0., .75, 0.]]).expand(5, 5)
    uniforms = torch.tensor([0., .2499, .25, .5, 1 - 1e-12], dtype=torch.float64)
    assert rollouts._invert(probabilities, uniforms).tolist() == [1, 1, 3, 3, 3]


# -- log-probabilities ----------------------------------------------------------------------------

def teacher_forced(model, prompts, completions, temperature):
    prompt = pad_left(prompts, PAD_ID)
    ids, mask = pad_right(completions.ids, PAD_ID)
    with torch.no_grad():
        states = plain_states(backbone_of(model), *prompt, ids, mask)
        values, _ = token_log_probs(states, model.get_output_embeddings(), ids, mask,
                                    temperature=temperature)
    return values, pad_values(completions.log_probs)


def pad_values(rows):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.] * (width - len(row))] for row in rows])


def test_log_probs_are_those_of_a_teacher_forced_forward(sharp):
    model = sharp[0]
    uniforms = uniforms_for(PROMPTS, 8)
    end = complete(model, PROMPTS, tokens=8, temperature=0.7, uniforms=uniforms).ids[2][2]
    done = complete(model, PROMPTS, tokens=8, temperature=0.7, uniforms=uniforms, ends=[end])
    assert len({len(row) for row in done.ids}) > 1, "ragged completions"
    expected, found = teacher_forced(model, PROMPTS, done, 0.7)
    assert (expected - found).abs().max() < 1e-4
    wrong, _ = teacher_forced(model, PROMPTS, done, 1.0)
    assert (wrong - found).abs().max() > 1e-2, "the broken twin: another temperature"
    shifted = Completions([row[1:] + row[:1] for row in done.ids], done.log_probs)
    wrong, _ = teacher_forced(model, PROMPTS, shifted, 0.7)
    assert (wrong - found).abs().max() > 1e-2, "the broken twin: shifted by one token"


def test_greedy_log_probs_are_at_temperature_one(sharp):
    done = complete(sharp[0], PROMPTS, temperature=0.3)
    expected, found = teacher_forced(sharp[0], PROMPTS, done, 1.0)
    assert (expected - found).abs().max() < 1e-4


# -- padding and prompts --------------------------------------------------------------------------

def test_padding_stands_on_the_asked_side_and_is_masked_by_length():
    ids, mask = pad_left([[0, 3], [4, 5, 6]], 0)
    assert ids.tolist() == [[0, 0, 3], [4, 5, 6]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    ids, mask = pad_right([[3, 0], [4, 5, 6]], 0)
    assert ids.tolist() == [[3, 0, 0], [4, 5, 6]] and mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_prompts_end_where_the_assistant_begins_and_long_ones_are_refused():
    _, tokenizer = policy()
    prompts = [[{"role": "user", "content": text}] for text in ("red", "red blue green")]
    rows = tokenize_prompts(tokenizer, prompts)
    assert [tokenizer.decode(row) for row in rows] == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        for text in ("red", "red blue green")]
    assert tokenize_prompts(tokenizer, prompts, max_prompt_tokens=len(rows[1])) == rows
    with pytest.raises(UserError, match=f"prompt 1 has {len(rows[1])} tokens"):
        tokenize_prompts(tokenizer, prompts, max_prompt_tokens=len(rows[1]) - 1)


# -- scores ---------------------------------------------------------------------------------------

def verdict(risk="normal", evidence=("e1",)):
    return render_verdict(evidence=list(evidence), features=["usual_hours", "usual_web"],
                          basis="as always.", risk=risk)


@functools.cache
def taught(risk, steps=70):
    """Return a model that has read one verdict with this risk again and again."""
    model, tokenizer = policy()
    prompt = [{"role": "user", "content": "the question"}]
    prompt_ids = tokenize_prompts(tokenizer, [prompt])[0]
    answer = [*tokenizer(verdict(risk), add_special_tokens=False)["input_ids"],
              tokenizer.eos_token_id]
    ids = torch.tensor([prompt_ids + answer])
    labels = torch.tensor([[-100] * len(prompt_ids) + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, prompt


def by_brute_force(model, tokenizer, prompt_ids, text):
    """Return log P(label) from one unpadded forward per whole text, all its tokens counted."""
    stem = text[:text.rindex('"risk": "') + len('"risk": "')]
    totals = []
    for risk in RISKS:
        answer = tokenizer(stem + risk + '"', add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt_ids + answer])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        targets = torch.tensor(answer)
        rows = torch.arange(len(prompt_ids) - 1, ids.size(1) - 1)
        totals.append(log_probs[rows, targets].sum())
    return torch.stack(totals).log_softmax(-1).numpy()


def test_risk_scores_are_the_normalised_probabilities_of_the_whole_labels():
    model, tokenizer = policy()
    texts = [verdict("normal"), verdict("malicious", ()), verdict("suspicious", ("e1", "e2"))]
    prompts = [[5, 9, 40], [12], [100, 7, 8, 9]]
    found = risk_scores(model, tokenizer, prompts, texts, batch_size=2)
    assert found.shape == (3, 3) and np.allclose(found.sum(1), 1)
    for row, prompt, text in zip(found, prompts, texts, strict=True):
        expected = by_brute_force(model, tokenizer, prompt, text)
        assert np.allclose(np.log(row), expected, atol=1e-3)
    rolled = [by_brute_force(model, tokenizer, p, t)
              for p, t in zip(prompts[1:] + prompts[:1], texts, strict=True)]
    assert not np.allclose(np.log(found), rolled, atol=1e-2), "the broken twin: another prompt"


def test_what_stands_behind_the_label_does_not_count(sharp):
    model, tokenizer = sharp
    texts = [verdict(risk) for risk in RISKS]
    found = risk_scores(model, tokenizer, [[12]] * 3, texts)
    assert np.allclose(found, found[0], atol=1e-6), "the same evidence, whichever label was said"


def test_a_text_without_a_risk_has_no_score(sharp):
    found = risk_scores(*sharp, [[12], [12], [12]], ["", verdict(), "risk: normal"])
    assert np.isnan(found[[0, 2]]).all() and np.isfinite(found[1]).all()


@pytest.mark.parametrize("risk", ["suspicious", "malicious"])
def test_scores_prefer_the_label_that_the_model_prefers(risk):
    model, tokenizer, prompt = taught(risk)
    ids = tokenize_prompts(tokenizer, [prompt])
    for said in RISKS:
        found = risk_scores(model, tokenizer, ids, [verdict(said)])[0]
        assert RISKS[int(found.argmax())] == risk and found.max() > 0.9
    untaught = risk_scores(*policy(), ids, [verdict(risk)])[0]
    assert RISKS[int(untaught.argmax())] == "normal", "an untaught one prefers the shortest label"


# -- the predictions table ------------------------------------------------------------------------

COLUMNS = ["detector", "seed", "window_id", "user", "day", "split", "label", "risk", "score",
           "features", "evidence", "valid", "seconds"]


def row(number, content="the question", label="malicious"):
    return {"prompt": [{"role": "user", "content": content}], "label": label,
            "window_id": f"U{number}_2010-01-0{number}", "user": f"U{number}",
            "day": f"2010-01-0{number}", "evidence_ids": ["e1", "e2"]}


def table_of(model, tokenizer, rows, **changes):
    options = {"detector": "tiny", "seed": 3, "split": "dev", "max_new_tokens": 110, **changes}
    return predict(model, tokenizer, rows, **options)


def test_a_taught_model_fills_the_predictions_table():
    model, tokenizer, _ = taught("malicious")
    table = table_of(model, tokenizer, [row(1), row(2, label="normal")])
    assert list(table.columns[:len(COLUMNS)]) == COLUMNS
    assert table["risk"].tolist() == ["malicious"] * 2 and table["valid"].all()
    assert table["label"].tolist() == ["malicious", "normal"]
    assert table["evidence"].tolist() == [["e1"]] * 2
    assert table["features"].tolist() == [["usual_hours", "usual_web"]] * 2
    assert (table["score"] > 0.9).all() and (table["score"] <= 1).all()
    assert set(table["detector"]) == {"tiny"} and set(table["seed"]) == {3}
    assert set(table["split"]) == {"dev"} and (table["seconds"] > 0).all()
    unknown = {**row(3), "evidence_ids": ["e7"]}
    found = table_of(model, tokenizer, [unknown]).iloc[0]
    assert (found["risk"], found["score"], found["problem"]) == (
        "invalid", -1.0, "unknown_evidence")


def test_an_untaught_model_is_invalid_and_scores_lowest():
    table = table_of(*policy(), [row(1), row(2)], max_new_tokens=4)
    assert table["risk"].tolist() == ["invalid"] * 2 and not table["valid"].any()
    assert table["score"].tolist() == [-1.0, -1.0]
    assert table["features"].tolist() == [[], []] and (table["problem"] != "").all()


def test_rows_keep_their_order_whatever_their_length(monkeypatch):
    """Prompts are sorted by length inside; each row must get the answer to its own prompt."""
    model, tokenizer = policy()
    contents = ["e2 " + "red " * n for n in (9, 1, 5, 3)]
    contents[1] = contents[1].replace("e2", "e1")
    contents[2] = contents[2].replace("e2", "e1")

    def quote(model, begun, *options):
        prompts = begun.groups.ids[begun.groups.index]
        texts = [verdict(evidence=["e1" if "e1" in tokenizer.decode(p) else "e2"])
                 for p in prompts]
        return Completions(tokenizer(texts, add_special_tokens=False)["input_ids"], [])

    monkeypatch.setattr(rollouts, "_decode", quote)
    rows = [row(i + 1, content) for i, content in enumerate(contents)]
    table = table_of(model, tokenizer, rows, batch_size=3)
    assert table["window_id"].tolist() == [r["window_id"] for r in rows]
    assert table["evidence"].tolist() == [["e2"], ["e1"], ["e1"], ["e2"]]


def test_predictions_do_not_depend_on_the_batch_size():
    model, tokenizer, _ = taught("malicious")
    rows = [row(i + 1, "the question " * n) for i, n in enumerate((3, 1, 2, 1, 5))]
    small, large = (table_of(model, tokenizer, rows, batch_size=size) for size in (2, 64))
    assert small["completion"].tolist() == large["completion"].tolist()
    assert np.allclose(small["score"], large["score"], atol=1e-5)


def test_what_cannot_be_shared_is_neither_sampled_nor_scored():
    model, tokenizer = policy()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="final_logit_softcapping"):
        complete(model, [[5, 6]], uniforms=uniforms_for([[5, 6]]))
    with pytest.raises(UserError, match="final_logit_softcapping"):
        risk_scores(model, tokenizer, [[5, 6]], [verdict()])
    with pytest.raises(UserError, match="final_logit_softcapping"):
        predict(model, tokenizer, [row(0)], detector="d", seed=0, split="s", max_new_tokens=2)
