"""Plausible mistakes in reading and writing files."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "the old destination goes first",
        "alibi_convert/writing/atomic.py",
        "                    yield path, journal\n",
        "                    shutil.rmtree(destination, ignore_errors=True)\n"
        "                    yield path, journal\n",
        "test_destinations.py -k nothing_stays",
    ),
    Mutant(
        "an interrupted run forgets its shards",
        "alibi_convert/writing/atomic.py",
        "is_kept = task is not None and bool(journal.files)",
        "is_kept = False",
        "test_interruption.py -k run_resumes",
    ),
    Mutant(
        "pickles without weights_only",
        "alibi_convert/formats/pt.py",
        "weights_only=True",
        "weights_only=False",
        "test_damaged_pickles.py -k need_consent",
    ),
    Mutant(
        "an index leads to pickles without consent",
        "alibi_convert/formats/shards.py",
        "state_dict(load_pickle(path, allow_pt), path)",
        "state_dict(load_pickle(path, True), path)",
        "test_damaged_pickles.py -k every_way",
    ),
    Mutant(
        "pipes waited for",
        "alibi_convert/files.py",
        "if not stat.S_ISREG(found.st_mode):",
        "if stat.S_ISDIR(found.st_mode):",
        "test_damage.py -k regular",
    ),
    Mutant(
        "JSON read whole, however large",
        "alibi_convert/files.py",
        "file.read(max_bytes + 1)",
        "file.read(max_bytes)",
        "test_damage.py -k sparse",
    ),
    Mutant(
        "archives mapped without their CRCs",
        "alibi_convert/formats/zip_file.py",
        "if crc != entry.CRC:",
        "if crc != entry.CRC and not entry.CRC:",
        "test_damaged_pickles.py -k archives",
    ),
    Mutant(
        "an archive's own headers not looked at",
        "alibi_convert/formats/zip_file.py",
        "    if not agrees:",
        "    if entry.compress_type:",
        "test_damaged_pickles.py -k archives",
    ),
    Mutant(
        "sizes of mapped tensors believed",
        "alibi_convert/formats/pt.py",
        "if begins and not set.intersection(*begins):",
        "if not begins and entries is None:",
        "test_damaged_pickles.py -k less_data",
    ),
    Mutant(
        "manifests of orbax unchecked",
        "alibi_convert/formats/orbax.py",
        "_crc32c(contents[:-4])):",
        "crc):",
        "test_damage.py -k manifests",
    ),
    Mutant(
        "the first step of orbax for the latest",
        "alibi_convert/formats/orbax.py",
        "max(steps) if step",
        "min(steps) if step",
        "test_training_states.py -k managers",
    ),
    Mutant(
        "steps ordered as text",
        "alibi_convert/formats/orbax.py",
        "return {int(found[0]): path",
        "return {found[0]: path",
        "test_training_states.py -k managers",
    ),
    Mutant(
        "a key of msgpack read twice",
        "alibi_convert/formats/msgpack.py",
        "tree = without_duplicates(pairs)",
        "tree = dict(pairs)",
        "test_damage.py -k contradicts",
    ),
    Mutant(
        "a prefix of some names cut off",
        "alibi_convert/formats/names.py",
        "all(name.startswith(prefix)",
        "any(name.startswith(prefix)",
        "test_training_states.py -k 'prefixes or wrapped'",
    ),
    Mutant(
        "any suffix is a folder's",
        "alibi_convert/formats/__init__.py",
        "suffix[1:].isalpha() or suffix.lower()",
        "suffix.lower()",
        "test_command_line.py -k suffixes",
    ),
    Mutant(
        "shards without an index count as complete",
        "alibi_convert/formats/shards.py",
        "if other not in numbers:",
        "if other == name:",
        "test_damage.py -k without_an_index",
    ),
    Mutant(
        "an adapter beside a config.json counts as a model without weights",
        "alibi_convert/formats/folder.py",
        "    _require_model(folder)\n",
        "    if not (folder / CONFIG_FILE).exists():\n        _require_model(folder)\n",
        "test_damage.py -k adapters_without",
    ),
    Mutant(
        "saving over a folder loses the other files in it",
        "alibi_convert/writing/origin.py",
        "_bring(folder / name, temporary / name)",
        "(folder / name).exists()",
        "test_pretrained.py -k came",
    ),
)
