"""The artifact: it comes back bit for bit, and whatever was changed is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import Normalization, imagenet
from smp_ensemble.ensembling.adaptive import AdaptiveRule
from smp_ensemble.ensembling.artifact import (
    ENSEMBLE_FILE,
    TRAINING_IMAGES_FILE,
    file_sha256,
    load_ensemble,
    read_spec,
    save_ensemble,
    verify,
)
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.postprocessing import Crf, PostProcessing
from smp_ensemble.ensembling.spec import COMBINER_FILE
from smp_ensemble.exceptions import ConfigError, IntegrityError, NetworkError

NAMES = ("land", "roof", "road")
SOURCES = ["models:/m-0", ""]
DIGESTS = [["b" * 32, "a" * 32], None]
MEMBER_FILES = ["config.json", "model.safetensors", TRAINING_IMAGES_FILE]


def make_member(seed: int, normalization: Normalization) -> Member:
    torch.manual_seed(seed)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    network = create_network("unet", encoder_name="tu-test_resnet", num_outputs=3, model_options=options)  # 0.3 MB
    return Member(network, normalization)


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    members = [make_member(0, imagenet()), make_member(1, Normalization("dataset", [0.1] * 3, [0.7, 0.2, 0.3], 4095.0))]
    for member, source, images in zip(members, SOURCES, DIGESTS, strict=True):
        member.source, member.training_images = source, images and frozenset(images)
    options = {"weights": [3, 1], "temperature": 1.3, "threshold": 0.4, "class_names": NAMES}
    return Ensemble(members, mode="multiclass", **options)


@pytest.fixture(scope="module")
def saved(ensemble, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "model"
    save_ensemble(ensemble, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@torch.inference_mode()
def predict(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(0, 255, 3 * 16 * 16).reshape(1, 3, 16, 16))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_comes_back_bit_for_bit(ensemble, saved):
    loaded = load_ensemble(saved)
    assert torch.equal(predict(loaded), predict(ensemble))
    for name in ("mode", "combiner", "weights", "views", "temperature", "threshold", "class_names"):
        assert getattr(loaded, name) == getattr(ensemble, name), name
    assert not any(module.training for module in loaded.modules())


def test_the_files_are_the_format(saved):
    files = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    assert files == [
        "ensemble.json",
        *(f"members/00/{name}" for name in MEMBER_FILES),
        "members/01/config.json",
        "members/01/model.safetensors",
    ]
    content = json.loads((saved / ENSEMBLE_FILE).read_text())
    assert content["class_names"] == list(NAMES)
    assert [member["source"] for member in content["members"]] == SOURCES
    assert content["members"][0]["sha256"] == {name: sha256(saved / "members/00" / name) for name in MEMBER_FILES}


def test_smp_opens_a_member_without_us(ensemble, saved):
    opened = smp.from_pretrained(saved / "members" / "01").eval()
    images = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(opened(images), ensemble.members[1].network(images))


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    save_ensemble(load_ensemble(saved), tmp_path / "again")
    for path in saved.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(saved)).read_bytes() == path.read_bytes()


def test_training_images_are_kept_where_they_are_known(saved):
    assert [member.training_images for member in load_ensemble(saved).members] == [frozenset(DIGESTS[0]), None]
    assert [member.source for member in load_ensemble(saved).members] == SOURCES
    assert (saved / "members/00" / TRAINING_IMAGES_FILE).read_text().split() == sorted(DIGESTS[0])


def test_the_digest_is_sha256(saved):
    assert file_sha256(saved / ENSEMBLE_FILE) == sha256(saved / ENSEMBLE_FILE)


def flip(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return sha256(path)


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    return sha256(path)


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return sha256(path)


def remove(path: Path) -> str:
    path.unlink()
    return "no file"


def make_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "no file"


def link(path: Path) -> str:
    target = path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(target)
    return f"a symbolic link to {target}"


def link_folder(path: Path) -> str:
    target = path.parent.rename(path.parents[3] / "elsewhere")
    path.parent.symlink_to(target, target_is_directory=True)
    return f"a symbolic link to {target / path.name}"


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove, make_folder, link])
@pytest.mark.parametrize("name", MEMBER_FILES)
def test_damage_names_the_file_and_what_was_expected_and_found(folder, name, damage):
    path = folder / "members" / "00" / name
    expected = sha256(path)
    found = damage(path)
    with pytest.raises(IntegrityError) as error:
        load_ensemble(folder)
    assert str(error.value) == f"{path} was changed: expected SHA-256 {expected}, found {found}"


def test_a_linked_folder_is_refused_too(folder):
    path = folder / "members" / "00" / "config.json"
    found = link_folder(path)
    with pytest.raises(IntegrityError, match=f"{path} was changed: .* found {found}"):
        load_ensemble(folder)


def test_the_artifact_itself_may_lie_behind_a_link(folder, tmp_path, ensemble):
    (tmp_path / "alias").symlink_to(folder, target_is_directory=True)
    assert torch.equal(predict(load_ensemble(tmp_path / "alias")), predict(ensemble))


def test_nothing_is_built_before_everything_is_verified(folder, monkeypatch):
    built = []
    monkeypatch.setattr("smp_ensemble.ensembling.artifact.load_network", built.append)
    flip(folder / "members" / "01" / "model.safetensors")
    with pytest.raises(IntegrityError, match="members/01"):
        load_ensemble(folder)
    assert built == []


@pytest.mark.parametrize("relative", ["../outside", "members/../../outside"])
def test_a_member_outside_the_artifact_is_refused(folder, relative):
    shutil.copytree(folder / "members" / "00", folder.parent / "outside")
    content = json.loads((folder / ENSEMBLE_FILE).read_text())
    content["members"][0]["folder"] = relative
    (folder / ENSEMBLE_FILE).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=f"names the folder '{relative}', which leaves the artifact: refused"):
        load_ensemble(folder)


def change_spec(folder: Path, **change) -> None:
    content = json.loads((folder / ENSEMBLE_FILE).read_text())
    for part in (content, content["members"][0], content["members"][0]["normalization"]):
        part.update({name: value for name, value in change.items() if name in part})
    (folder / ENSEMBLE_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "none"}, "unknown mode 'none'"),
        ({"mode": ["binary"]}, "unknown mode"),
        ({"weight": -1}, "weights must be finite and not negative"),
        ({"std": [0, 0, 0]}, "std"),
        ({"mean": "grey"}, "expected a normalization with kind, mean, std and maximum"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"temperature": "warm"}, "ValueError"),
        ({"threshold": float("nan")}, "threshold must lie between 0 and 1"),
        ({"reject": 1}, "reject must be 0"),
        ({"reject": None}, "TypeError"),
        ({"reject": [0.5]}, "TypeError"),
        ({"views": ["d5"]}, "unknown views 'd5'"),
        ({"views": "d4"}, "unknown views 'd'"),
        ({"views": 4}, "TypeError"),
        ({"views": None}, "TypeError"),
        ({"postprocess": {"opening": -1}}, "expected opening as a whole number from 0, got -1"),
        ({"postprocess": {"opning": 1}}, "unknown setting 'opning' of post-processing: did you mean 'opening'"),
        ({"postprocess": {"crf": [1]}}, "expected the settings of crf as a JSON object"),
        ({"postprocess": None}, "expected an object, got None"),
        ({"postprocess": []}, r"expected an object, got \[\]"),
        ({"postprocess": "min_area"}, "expected an object, got 'min_area'"),
        ({"combiner": "stacking"}, "stacking needs a head"),
        ({"combiner": "vote"}, "shares of votes have no temperature"),
    ],
)
def test_values_that_make_no_sense_are_damage_and_the_file_is_named(folder, change, message):
    change_spec(folder, **change)
    with pytest.raises(IntegrityError, match=f"{folder / ENSEMBLE_FILE} does not hold what it should: .*{message}"):
        load_ensemble(folder)


RULE = AdaptiveRule(0.001, 0.004, 0.25, ((0.5, 0.01, 1e-6),))


def test_an_adaptive_rule_comes_back_and_is_verified_like_the_rest(ensemble, tmp_path):
    members = list(ensemble.members)
    save_ensemble(Ensemble(members, mode="multiclass", class_names=NAMES, adaptive=RULE), tmp_path / "model")
    assert load_ensemble(tmp_path / "model").adaptive == RULE


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "expected an adaptive rule as a JSON object"),
        ({**RULE.to_dict(), "limit": -1}, "expected limit of an adaptive rule as a number from 0 to 1, got -1"),
        ({**RULE.to_dict(), "limit": 10**400}, "expected limit of an adaptive rule"),
        ({**RULE.to_dict(), "changes": [[float("nan")]]}, "expected changes of an adaptive rule as a number"),
        ({**RULE.to_dict(), "changes": [[0.1, 0.2]]}, "expected changes that do not grow with the margin"),
        ({**RULE.to_dict(), "changes": []}, "expected an adaptive rule for 2 members, got one for 1"),
        ({**RULE.to_dict(), "more": 1}, "unknown setting 'more' of an adaptive rule"),
        ([1], r"expected an object, got \[1\]"),
        (None, "expected an object, got None"),
    ],
)
def test_an_adaptive_rule_that_makes_no_sense_is_damage(folder, rule, message):
    content = json.loads((folder / ENSEMBLE_FILE).read_text())
    (folder / ENSEMBLE_FILE).write_text(json.dumps({**content, "adaptive": rule}))
    with pytest.raises(IntegrityError, match=f"{folder / ENSEMBLE_FILE} does not hold what it should: .*{message}"):
        load_ensemble(folder)


@pytest.mark.parametrize("name", ["os.system", "not-installed"])
def test_a_combiner_that_is_not_installed_is_no_damage(folder, name):
    change_spec(folder, combiner=name)
    with pytest.raises(ConfigError, match=f"unknown combiner '{name}'"):
        load_ensemble(folder)


def test_verify_passes_what_is_whole(saved):
    verify(read_spec(saved), saved)


def test_an_ensemble_without_names_or_members_of_ours_is_not_saved(ensemble, tmp_path):
    with pytest.raises(ConfigError, match="needs class_names"):
        save_ensemble(Ensemble(list(ensemble.members), mode="multiclass"), tmp_path / "a")
    plain = Ensemble([nn.Conv2d(3, 3, 1)], mode="multiclass", class_names=NAMES)
    with pytest.raises(ConfigError, match=r"member 0 is a Conv2d: wrap it as Member\(network, normalization\)"):
        save_ensemble(plain, tmp_path / "b")
    foreign = Ensemble([Member(nn.Conv2d(3, 3, 1), imagenet())], mode="multiclass", class_names=NAMES)
    with pytest.raises(NetworkError, match="expected one of smp's own networks or a registered architecture"):
        save_ensemble(foreign, tmp_path / "c")


def test_members_of_other_bands_are_not_saved_together(ensemble, tmp_path):
    other = Member(ensemble.members[0].network, Normalization("none", [0.0] * 4, [1.0] * 4))
    mixed = Ensemble([ensemble.members[0], other], mode="multiclass", class_names=NAMES)
    with pytest.raises(NetworkError, match="members must agree in bands: member 0 takes 3, member 1 4"):
        save_ensemble(mixed, tmp_path / "model")


@pytest.fixture(scope="module")
def stacked(ensemble) -> Ensemble:
    """Everything that an ensemble may carry, none of it by default."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(21, generator=generator)
    members = list(ensemble.members)
    members[0].threshold, members[0].temperature = 0.3, 2.5
    return Ensemble(
        members,
        mode="multiclass",
        combiner="stacking",
        weights=[3, 1],
        views="flips+scales:0.5,1",
        temperature=1.3,
        reject=0.4,
        state={"weight": head[:18].view(2, 3, 3), "bias": head[18:]},  # two views of one memory
        postprocess=PostProcessing(closing=2, min_area=9, crf=Crf(iterations=2, window=5)),
        class_names=NAMES,
    )


@pytest.fixture
def stacked_folder(stacked, tmp_path) -> Path:
    save_ensemble(stacked, tmp_path / "stacked")
    return tmp_path / "stacked"


def test_all_that_an_ensemble_carries_comes_back(stacked, stacked_folder, tmp_path):
    loaded = load_ensemble(stacked_folder)
    assert torch.equal(predict(loaded), predict(stacked))
    for name in ("combiner", "weights", "views", "temperature", "threshold", "reject", "postprocess", "class_names"):
        assert getattr(loaded, name) == getattr(stacked, name), name
    assert loaded.views == ("flips", "scales:0.5,1")
    assert loaded.postprocess.crf == Crf(iterations=2, window=5)
    assert set(loaded.state) == {"weight", "bias"}
    assert all(torch.equal(loaded.state[name], stacked.state[name]) for name in loaded.state)
    assert [(one.threshold, one.temperature) for one in loaded.members] == [(0.3, 2.5), (0.5, 1.0)]
    probabilities = predict(loaded)
    assert torch.equal(loaded.decide(probabilities), stacked.decide(probabilities))
    save_ensemble(loaded, tmp_path / "again")
    for name in (ENSEMBLE_FILE, COMBINER_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (stacked_folder / name).read_bytes()


def test_the_state_lies_beside_the_spec_in_safetensors(stacked_folder):
    state = load_file(stacked_folder / COMBINER_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"weight": (2, 3, 3), "bias": (3,)}
    content = json.loads((stacked_folder / ENSEMBLE_FILE).read_text())
    assert content["combiner_sha256"] == sha256(stacked_folder / COMBINER_FILE)
    assert content["reject"] == 0.4


def test_a_combiner_without_state_has_no_file(saved):
    assert not (saved / COMBINER_FILE).exists()
    assert read_spec(saved).combiner_sha256 is None
    assert load_ensemble(saved).state == {}


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove, make_folder])
def test_damage_of_the_combiners_state_is_named_too(stacked_folder, damage):
    path = stacked_folder / COMBINER_FILE
    expected = sha256(path)
    found = damage(path)
    with pytest.raises(IntegrityError) as error:
        load_ensemble(stacked_folder)
    assert str(error.value) == f"{path} was changed: expected SHA-256 {expected}, found {found}"


def test_a_link_in_place_of_the_combiners_state_is_refused(stacked_folder):
    path = stacked_folder / COMBINER_FILE
    target = path.rename(stacked_folder.parent / "elsewhere")
    path.symlink_to(target)
    with pytest.raises(IntegrityError, match=f"{path} was changed: .*found a symbolic link to {target}"):
        load_ensemble(stacked_folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_a_state_that_was_never_safetensors_is_named(stacked_folder, content):
    path = stacked_folder / COMBINER_FILE
    path.write_bytes(content)
    change_spec(stacked_folder, combiner_sha256=sha256(path))
    with pytest.raises(IntegrityError, match=f"cannot read {path}"):
        load_ensemble(stacked_folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3, 3)}, "stacking needs a head .* got .*weight"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, r"expected stacking's weight of shape \(M, K, K\)"),
    ],
)
def test_a_state_of_another_combiner_is_damage(stacked_folder, state, message):
    save_file(state, stacked_folder / COMBINER_FILE)
    change_spec(stacked_folder, combiner_sha256=sha256(stacked_folder / COMBINER_FILE))
    with pytest.raises(IntegrityError, match=f"{ENSEMBLE_FILE} does not hold what it should: {message}"):
        load_ensemble(stacked_folder)


def test_an_older_file_without_the_newer_keys_loads_with_defaults(folder, ensemble):
    content = json.loads((folder / ENSEMBLE_FILE).read_text())
    for name in ("reject", "combiner_sha256", "postprocess"):
        del content[name]
    for member in content["members"]:
        del member["threshold"], member["temperature"]
    (folder / ENSEMBLE_FILE).write_text(json.dumps(content))
    loaded = load_ensemble(folder)
    assert torch.equal(predict(loaded), predict(ensemble))
    assert (loaded.reject, loaded.state, loaded.postprocess) == (0, {}, PostProcessing())
    assert [(one.threshold, one.temperature) for one in loaded.members] == [(0.5, 1)] * 2


@pytest.mark.parametrize("reject", [None, 0.0, 0.7])
def test_a_majority_keeps_what_it_rejects(ensemble, tmp_path, reject):
    voting = Ensemble(list(ensemble.members), mode="multiclass", combiner="majority", reject=reject, class_names=NAMES)
    save_ensemble(voting, tmp_path / "majority")
    loaded = load_ensemble(tmp_path / "majority")
    assert loaded.reject == voting.reject == (0.5 if reject is None else reject)
    assert loaded.votes
    assert torch.equal(loaded.decide(predict(loaded)), voting.decide(predict(voting)))
