import json


def test_doctor_finds_what_training_needs(command):
    found = {row["what"]: row for row in json.loads(command("doctor", "--json").stdout)}
    assert found["deepspeed"]["status"] == "ok"
    assert found["GPU"]["fix"]
