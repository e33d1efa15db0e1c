"""The demo's task: its text, its batches, its small model and the cache."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from curvopt.demo import task as demo_task

TINY = replace(demo_task.QUICK, steps=3, warmup=1, batch=2, length=16)


@pytest.fixture(scope="module")
def domains():
    return demo_task.load_text_domains()


def test_topics_are_split_without_overlap():
    train, held = demo_task.split_topics()
    assert held and not set(train) & set(held)
    paragraphs = {part.strip() for text in held.values() for part in text.split("\n\n")} - {""}
    assert not [text for text in train.values() if paragraphs & {part.strip() for part in text.split("\n\n")}]
    assert demo_task.split_topics() == (train, held)


def test_source_is_the_standard_library_without_tests_or_documents():
    files = demo_task.source_files()
    names = {path.as_posix() for path in files}
    assert len(files) > 100 and any(name.endswith("/argparse.py") for name in names)
    assert not [name for name in names if "site-packages" in name or "pydoc_data" in name]
    assert not [path for path in files if {"test", "tests"} & set(path.parts[-3:-1])]
    assert files == demo_task.source_files()


def test_domains_are_deterministic(domains):
    again = demo_task.load_text_domains()
    assert again.digest() == domains.digest()
    for name in ("source", "source_heldout", "topics", "topics_heldout"):
        assert torch.equal(getattr(again, name), getattr(domains, name))
        assert getattr(domains, name).dtype == torch.uint8 and len(getattr(domains, name)) > 10_000


def test_byte_tokens_are_the_utf8_bytes():
    assert bytes(demo_task.byte_tokens("Zürich").tolist()) == "Zürich".encode()


def test_batches_depend_on_the_seed_alone():
    tokens = torch.arange(100, dtype=torch.uint8)
    torch.manual_seed(1)
    one = torch.stack(list(demo_task.batches(tokens, 3, 7, 5, seed=4)))
    torch.manual_seed(2)
    two = torch.stack(list(demo_task.batches(tokens, 3, 7, 5, seed=4)))
    other = torch.stack(list(demo_task.batches(tokens, 3, 7, 5, seed=5)))
    assert one.shape == (5, 3, 7) and one.dtype == torch.int64
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert (one.diff(dim=-1) == 1).all()  # windows are consecutive tokens
    assert torch.equal(next(demo_task.batches(tokens, 1, 100, 1, seed=0))[0], tokens.long())  # the whole stream


@pytest.mark.parametrize("change", [{"steps": 4}, {"lr": 2e-2}, {"hidden": 16}, {"seed": 1}])
def test_cache_key_changes_with_the_configuration(change, domains, tmp_path):
    folder = demo_task.cached_folder(tmp_path, domains, TINY)
    assert folder == demo_task.cached_folder(tmp_path, domains, replace(TINY))
    assert folder != demo_task.cached_folder(tmp_path, domains, replace(TINY, **change))


def test_cache_key_changes_with_the_text(domains, tmp_path):
    other = replace(domains, source=domains.source[1:])
    assert demo_task.cached_folder(tmp_path, domains, TINY) != demo_task.cached_folder(tmp_path, other, TINY)


def test_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_task.default_cache() == tmp_path / ".cache" / "curvopt"


def test_evaluate_is_the_mean_loss_and_leaves_the_model_as_it_was():
    model = demo_task.untrained_model(TINY).train()
    tokens = torch.arange(64, dtype=torch.uint8)
    x = tokens.view(4, 16).long()
    expected = model(input_ids=x, labels=x).loss.item()
    assert demo_task.evaluate(model, tokens, length=16, batch=3) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_lora_model_copies_the_base_and_starts_from_its_seed():
    base = demo_task.untrained_model(TINY)
    state = torch.get_rng_state()
    one, two, other = (demo_task.lora_model(base, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (one, two, other)]
    assert len(trained[0]) == 2 * 7 * TINY.layers
    assert all(torch.equal(a, b) for a, b in zip(*trained[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*trained[1:], strict=True))
    assert not any("lora" in name for name, _ in base.named_modules())


def test_fine_tune_decays_the_rate_to_zero():
    model = demo_task.untrained_model(TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = demo_task.batches(torch.arange(64, dtype=torch.uint8), 2, 8, 4, seed=0)
    seen = []
    curve = demo_task.fine_tune(
        model, optimizer, data, 4, lambda done, total, _: seen.append((done, total, optimizer.param_groups[0]["lr"]))
    )
    assert seen == [(1, 4, 0.375), (2, 4, 0.25), (3, 4, 0.125), (4, 4, 0.0)]
    assert len(curve) == 4 and curve[-1] < curve[0]


def test_damaged_cache_is_rebuilt_with_one_line(tmp_path, domains, caplog):
    model = demo_task.pretrained_model(tmp_path, None, TINY, domains)
    first = [p.detach().clone() for p in model.parameters()]  # the model itself maps the file
    del model
    file = demo_task.cached_folder(tmp_path, domains, TINY) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    second = demo_task.pretrained_model(tmp_path, None, TINY, domains)
    assert [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    for a, b in zip(first, second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == [file.parent.name]
