import json

from ranks import sparse_gpt


def test_doctor_finds_what_training_needs():
    found = {row["what"]: row for row in json.loads(sparse_gpt("doctor", "--json").stdout)}
    assert found["deepspeed"]["status"] == "ok"
    assert found["GPU"]["fix"]
