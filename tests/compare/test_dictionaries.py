"""Every library's file gives the same features as rows."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from e2e_fast.compare import match_dictionaries, read_dictionary

N, D = 6, 4
DEC, ENC = torch.randn(N, D, generator=torch.Generator().manual_seed(0)), torch.arange(float(N * D)).view(N, D)
T_DEC, T_ENC = DEC.T.contiguous(), ENC.T.contiguous()
LAYOUTS = {
    "e2e_sae": {"blocks-2-hook_resid_pre.decoder.weight": T_DEC, "blocks-2-hook_resid_pre.encoder.0.weight": ENC},
    "dictionary_learning": {"decoder.weight": T_DEC, "encoder.weight": ENC, "b_dec": torch.zeros(D)},
    "sparsify": {"W_dec": DEC, "encoder.weight": ENC, "encoder.bias": torch.zeros(N)},
    "sae_lens": {"W_dec": DEC, "W_enc": T_ENC, "b_enc": torch.zeros(N)},
    "llamascopium": {"W_D": DEC, "W_E": T_ENC},
    "ours": {"W_dec": DEC, "W_enc": ENC},
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("library", LAYOUTS)
def test_each_librarys_file_gives_rows_of_features(library: str, suffix: str, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pt" else save_file
    save(LAYOUTS[library], path)
    assert torch.equal(read_dictionary(path), DEC)
    assert torch.equal(read_dictionary(str(path), which="encoder"), ENC)


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "sae.safetensors", "only.safetensors"])
def test_folders_are_read_by_their_one_file(name: str, tmp_path: Path):
    save_file(LAYOUTS["sparsify"], tmp_path / name)
    (tmp_path / "cfg.json").write_text("{}")
    assert torch.equal(read_dictionary(tmp_path), DEC)


def test_the_last_checkpoint_of_an_e2e_sae_folder_is_taken(tmp_path: Path):
    for samples in (900, 10_000):
        torch.save({k: v * samples for k, v in LAYOUTS["e2e_sae"].items()}, tmp_path / f"samples_{samples}.pt")
    assert torch.equal(read_dictionary(tmp_path), DEC * 10_000)


def test_one_of_several_saes_is_asked_for_by_name(tmp_path: Path):
    tensors = {f"blocks-{i}-hook_resid_pre.decoder.weight": (T_DEC * i).contiguous() for i in (1, 3)}
    save_file(tensors, path := tmp_path / "two.safetensors")
    assert torch.equal(read_dictionary(f"{path}::blocks.3.hook_resid_pre"), DEC * 3)
    assert torch.equal(read_dictionary(f"{path}::blocks-1-hook_resid_pre"), DEC)
    for wrong in (path, f"{path}::blocks.2.hook_resid_pre"):
        with pytest.raises(ValueError, match=r"holds SAEs \['blocks.1.hook_resid_pre', 'blocks.3.hook_resid_pre'\]"):
            read_dictionary(wrong)


def test_bare_matrices_and_named_arrays(tmp_path: Path):
    np.save(tmp_path / "a.npy", DEC.numpy())
    np.savez(tmp_path / "b.npz", first=DEC.numpy(), second=ENC.numpy())
    torch.save(DEC, tmp_path / "c.pt")
    torch.save({"state_dict": LAYOUTS["dictionary_learning"], "config": {"k": 8}}, tmp_path / "d.pt")
    for source in ("a.npy", "b.npz::first", "c.pt", "d.pt"):
        assert torch.equal(read_dictionary(str(tmp_path / source)), DEC)
    with pytest.raises(ValueError, match=r"must hold a decoder or a single matrix, found \['first', 'second'\]"):
        read_dictionary(tmp_path / "b.npz")


def test_objects_tensors_and_arrays():
    for W_enc in (ENC, T_ENC):
        sae = SimpleNamespace(W_dec=torch.nn.Parameter(DEC), W_enc=W_enc)
        assert torch.equal(read_dictionary(sae), DEC)
        assert torch.equal(read_dictionary(sae, which="encoder"), ENC)
    assert torch.equal(read_dictionary(SimpleNamespace(saes={"blocks.0": sae})), DEC)
    with pytest.raises(ValueError, match="has 2 SAEs"):
        read_dictionary(SimpleNamespace(saes={"a": sae, "b": sae}))
    assert read_dictionary(DEC.bfloat16()).dtype == torch.float32
    assert read_dictionary(DEC.double().numpy()).dtype == torch.float64


def test_arrays_that_torch_does_not_take_as_they_lie_are_read_all_the_same(tmp_path: Path):
    swapped = DEC.numpy().astype(">f4")
    np.savez(tmp_path / "swapped.npz", W_dec=swapped, W_enc=T_ENC.numpy().astype(">f4"))
    np.save(tmp_path / "swapped.npy", swapped)
    np.save(tmp_path / "plain.npy", DEC.numpy())
    mapped = np.load(tmp_path / "plain.npy", mmap_mode="r")
    backwards = np.ascontiguousarray(DEC.numpy()[::-1, ::-1])[::-1, ::-1]
    sources = [swapped, mapped, backwards, tmp_path / "swapped.npz", tmp_path / "swapped.npy"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in sources:
            assert torch.equal(read_dictionary(source), DEC)
        assert torch.equal(read_dictionary(tmp_path / "swapped.npz", which="encoder"), ENC)


def test_files_of_no_numbers_or_of_another_name_are_refused(tmp_path: Path):
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="expected a tensor or an array of numbers, got ndarray"):
        read_dictionary(tmp_path / "words.npy")
    np.savez(tmp_path / "one.npz", first=DEC.numpy())
    assert torch.equal(read_dictionary(f"{tmp_path}/one.npz::first"), DEC)
    with pytest.raises(ValueError, match=r"must hold a decoder or a single matrix named 'second', found \['first'\]"):
        read_dictionary(f"{tmp_path}/one.npz::second")


def test_a_home_of_nobody_is_no_such_folder():
    with pytest.raises(FileNotFoundError, match="no such file or folder: ~nobody_of_that_name/x"):
        read_dictionary("~nobody_of_that_name/x")


def test_joint_rows_multiply_to_the_weighted_cosine_and_half_zero_features_are_zero():
    dec, enc = DEC.double().clone(), ENC.double().clone()
    enc[0] = 0.0
    rows = read_dictionary(SimpleNamespace(W_dec=dec, W_enc=enc), which="both", encoder_share=0.3)
    unit = [torch.nn.functional.normalize(x[1:], dim=1) for x in (dec, enc)]
    expected = 0.7 * unit[0] @ unit[0].T + 0.3 * unit[1] @ unit[1].T
    torch.testing.assert_close(rows[1:] @ rows[1:].T, expected)
    assert (rows[0] == 0).all()


def test_pickled_code_is_not_executed(tmp_path: Path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"decoder.weight": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_dictionary(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (__file__, {}, "must end in one of .npy"),
        (DEC, {"which": "bias"}, "which must be"),
        (DEC, {"which": "both", "encoder_share": 1.0}, "encoder_share must lie"),
        (SimpleNamespace(W_dec=DEC), {"which": "encoder"}, "needs encoder weights"),
        (SimpleNamespace(W_dec=DEC, W_enc=ENC[:3]), {"which": "both"}, "agree in shape"),
    ],
)
def test_sources_that_lack_what_is_asked_are_refused(source, options, message: str):
    with pytest.raises(ValueError, match=message):
        read_dictionary(source, **options)


@pytest.mark.shared
def test_golden_e2e_sae_checkpoints_match_their_own_initialisation(shared: Path):
    folder = shared / "golden" / "e2e_sae" / "stories260K-local"
    m = match_dictionaries(folder / "init.safetensors", folder / "final.safetensors")
    assert m.certified
    assert m.shape[0] == m.shape[1] > m.shape[2] == 64
    # Training moves features, but each stays nearest to where it began.
    assert (m.rows == m.cols).mean() > 0.9
