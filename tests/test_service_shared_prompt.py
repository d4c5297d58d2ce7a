"""The whole service: outputs of a prompt share its prefill, and each is what it would be alone."""

from tests.fakes.arithmetic_engine import ONCE, next_token
from tests.service_process import running_service

# Three chunks of at most four tokens, and the last token, which is decoded.
PROMPT = [ONCE, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def continuation(seed: int, num_tokens: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, seed))
    return tokens[len(PROMPT) :]


def test_four_outputs_of_a_prompt_that_may_be_prefilled_once(tmp_path):
    with running_service(tmp_path, "--prefix-cache-bytes=0") as service:
        answer = service.generate(PROMPT, n=4, seed=30, temperature=1.0, max_tokens=5)
        assert answer.status_code == 200, service.log
        drawn = [output["token_ids"] for output in answer.json()["outputs"]]
        assert drawn == [continuation(30 + k, 5) for k in range(4)]
        # 905 + 2 + … + 10 is 959; the four seeds are added to it.
        assert [ids[0] for ids in drawn] == [989, 990, 991, 992]
        assert answer.json()["usage"]["prompt_tokens"] == len(PROMPT)
        # That it was prefilled at all shows in the next time, which is one too many.
        assert service.generate(PROMPT, max_tokens=1).status_code == 503
        assert "prefilled twice" in service.log
