"""The remote scorer against a server of its protocol."""

import logging
import re
import threading

import pytest
from judge_server import JudgeServer
from PIL import Image

from mmrag.content import Content
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.rerankers.base import DeadlineError
from mmrag.rerankers.prompts import RerankPrompt
from mmrag.rerankers.remote import RemoteScorer


def relevance(text):
    """The number that a document states of itself."""
    return float(re.search(r"worth (\d\.\d+)", text)[1])


@pytest.fixture
def serve():
    servers = []

    def start(**options):
        servers.append(JudgeServer(relevance, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def pairs(*worths):
    query = Content("Which?")
    return [(query, Content(f"worth {worth}")) for worth in worths]


def scorer(server, **options):
    return RemoteScorer("judge", server.url, **({"retries": 0, "timeout": 5.0} | options))


def test_scores_by_log_probabilities(serve):
    server = serve()
    outcomes = scorer(server).judge(pairs(0.8, 0.25, 0.5))
    assert outcomes == pytest.approx([0.8, 0.25, 0.5])
    body = server.requests[0]
    assert body["logprobs"] is True
    assert body["max_tokens"] == 1
    assert body["temperature"] == 0
    assert body["messages"][0]["content"] == (
        "Question: Which?\nDocument: worth 0.8\n"
        "Does the above document answer the question? True or False"
    )


def test_a_word_that_is_not_listed_is_bounded_by_the_least_likely(serve):
    (outcome,) = scorer(serve()).judge(pairs(1.0))
    assert outcome == pytest.approx(0.9 / (0.9 + 0.05))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("able", "mode"), [(["schema"], "schema"), (["words"], "words")])
def test_asks_for_grades_where_there_are_no_log_probabilities(serve, caplog, strict, able, mode):
    server = serve(able=able, strict=strict)
    judge = scorer(server)
    with caplog.at_level(logging.WARNING):
        assert judge.judge(pairs(0.8, 0.3)) == pytest.approx([0.8, 0.3])
        found_out = len(server.requests)
        assert judge.judge(pairs(0.1, 0.9)) == pytest.approx([0.1, 0.9])
    assert judge.mode == mode
    assert len(server.requests) == found_out + 2
    assert sum("gives no log-probabilities" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("able", [["logprobs", "schema", "words"], ["schema"]])
def test_a_refused_pair_does_not_make_the_scorer_coarse(serve, able):
    """A pair that is too long, say, is refused in every mode: the mode is not at fault."""
    server = serve(able=able, strict=True, fail=lambda t: 400 if "worth 0.2" in t else None)
    judge = scorer(server)
    bad, good = judge.judge(pairs(0.2, 0.8))
    assert isinstance(bad, EndpointError)
    assert good == pytest.approx(0.8)
    assert judge.mode == able[0]
    (again,) = judge.judge(pairs(0.9))
    assert again == pytest.approx(0.9)


def test_images_tasks_and_system_turns_are_sent(serve):
    server = serve()
    query = Content("Which?", Image.new("RGB", (40, 30)))
    document = Content("worth 0.5", Image.new("RGB", (4000, 10)))
    prompt = RerankPrompt("Q {query}\nD {document}\nOk?", system="Judge.")
    judge = scorer(server, prompt=prompt, max_pixels=1000)
    judge.judge([(query, document)], "image_for_question")
    system, user = server.requests[0]["messages"]
    assert system == {"role": "system", "content": "Judge."}
    kinds = [part.get("text") or part["image_url"]["url"][:22] for part in user["content"]]
    assert kinds == [
        "Task: Find an image that answers the question.\nQ ",
        "data:image/png;base64,",
        "Which?\nD ",
        "data:image/png;base64,",
        "worth 0.5\nOk?",
    ]


def test_models_without_eyes_get_the_text_alone(serve):
    server = serve()
    image = Image.new("RGB", (40, 30))
    given = [(Content("q"), Content("worth 0.5", image)), (Content("q"), Content(image=image))]
    seen, unseen = scorer(server, images=False).judge(given)
    assert seen == pytest.approx(0.5)
    assert isinstance(unseen, ContentError)
    assert [type(request["messages"][0]["content"]) for request in server.requests] == [str]


def test_failures_stay_with_their_pairs(serve, tmp_path):
    server = serve(fail=lambda text: 500 if "worth 0.2" in text else None)
    query = Content("q")
    gone = (query, Content("worth 0.5", tmp_path / "gone.png"))
    outcomes = scorer(server).judge([*pairs(0.8, 0.2), gone, *pairs(0.9)])
    assert outcomes[0] == pytest.approx(0.8)
    assert isinstance(outcomes[1], EndpointError)
    assert isinstance(outcomes[2], ContentError)
    assert outcomes[3] == pytest.approx(0.9)


def test_busy_servers_are_asked_again(serve):
    busy = [503, 429]
    server = serve(fail=lambda text: busy.pop() if busy else None)
    assert scorer(server, retries=2).judge(pairs(0.8)) == pytest.approx([0.8])
    assert len(server.requests) == 3


def test_requests_under_way_are_limited(serve):
    server = serve()
    judge = scorer(server, concurrency=3, mode="logprobs")
    judge.judge(pairs(*[0.5] * 12))
    assert server.most == 3


def test_a_deadline_ends_the_call(serve):
    server = serve(fail=lambda text: "hang" if "worth 0.2" in text else None)
    outcomes = scorer(server, deadline=0.7, timeout=30.0).judge(pairs(0.8, 0.2, 0.9))
    assert outcomes[0] == pytest.approx(0.8)
    assert isinstance(outcomes[1], EndpointError)
    assert outcomes[2] == pytest.approx(0.9)


def test_a_silent_server_spends_the_deadline_once(serve):
    server = serve(fail=lambda text: "hang")
    outcomes = scorer(server, deadline=0.3, timeout=30.0).judge(pairs(*[0.5] * 20))
    assert len(outcomes) == 20
    assert all(isinstance(outcome, EndpointError) for outcome in outcomes)
    assert isinstance(outcomes[-1], DeadlineError)
    assert len(server.requests) < 20


@pytest.mark.parametrize(("status", "said"), [(401, "API key"), (404, "no such model")])
def test_refusals_are_explained(serve, status, said):
    server = serve(fail=lambda text: status)
    (outcome,) = scorer(server).judge(pairs(0.5))
    assert isinstance(outcome, EndpointError)
    assert said in str(outcome)


@pytest.mark.parametrize("failure", ["garbage", "hollow", "cut"])
def test_broken_answers_are_errors_of_the_server(serve, failure):
    server = serve(fail=lambda text: failure if "worth 0.2" in text else None)
    good, bad = scorer(server).judge(pairs(0.8, 0.2))
    assert good == pytest.approx(0.8)
    assert isinstance(bad, EndpointError)
    (alone,) = scorer(serve(fail=lambda text: failure)).judge(pairs(0.5))
    assert isinstance(alone, EndpointError)


@pytest.mark.parametrize("mode", ["logprobs", "schema", "words"])
def test_a_choice_without_a_message_is_an_error_of_its_pair(serve, mode):
    server = serve(fail=lambda text: "blank" if "worth 0.2" in text else None)
    good, bad = scorer(server, mode=mode).judge(pairs(0.8, 0.2))
    assert good == pytest.approx(0.8)
    assert isinstance(bad, EndpointError)


def test_an_absent_server_is_named():
    (outcome,) = RemoteScorer("m", "http://127.0.0.1:9/v1", retries=0).judge(pairs(0.5))
    assert isinstance(outcome, EndpointError)
    assert "cannot be reached" in str(outcome)


@pytest.mark.parametrize("said", ["I would rather not.", '{"grade": 11}', "[]"])
def test_nonsense_is_an_error_and_no_score(serve, said):
    server = serve()
    server.answer = said
    (outcome,) = scorer(server, mode="schema").judge(pairs(0.5))
    assert isinstance(outcome, EndpointError)


def test_a_server_that_takes_no_mode_seriously_is_asked_once_for_each(serve):
    server = serve(able=["schema"])
    server.answer = "I would rather not."
    outcomes = scorer(server, concurrency=1).judge(pairs(0.5, 0.5, 0.5))
    assert all(isinstance(outcome, EndpointError) for outcome in outcomes)
    assert len(server.requests) == 2 + 3  # one with a pair that cannot be at fault


def test_other_words_than_the_answers_are_an_error(serve):
    prompt = RerankPrompt("{query}{document}", ("yes", "no"))
    (outcome,) = scorer(serve(), prompt=prompt, mode="logprobs").judge(pairs(0.5))
    assert isinstance(outcome, EndpointError)
    assert "yes or no" in str(outcome)


@pytest.mark.parametrize("bad", [{"concurrency": 0}, {"mode": "votes"}, {"deadline": 0}])
def test_senseless_options_are_refused(bad):
    with pytest.raises(ConfigError):
        RemoteScorer("m", "http://x/v1", **bad)


def test_nothing_goes_on_after_the_deadline(serve):
    server = serve(fail=lambda text: "hang")
    scorer(server, deadline=0.3, timeout=30.0, retries=3, mode="logprobs").judge(pairs(0.5, 0.5))
    workers = [t for t in threading.enumerate() if t.name.startswith("mmrag-rerank")]
    for worker in workers:
        worker.join(timeout=5.0)
    assert not any(worker.is_alive() for worker in workers)
    assert len(server.requests) == 2


def test_a_busy_server_is_asked_again_within_the_deadline(serve):
    statuses = iter([503, 429])
    server = serve(fail=lambda text: next(statuses, None))
    (outcome,) = scorer(server, deadline=20.0, retries=3, mode="logprobs").judge(pairs(0.8))
    assert outcome == pytest.approx(0.8)
    assert len(server.requests) == 3


def test_reasoning_in_front_of_a_grade_is_not_graded(serve):
    server = serve()
    server.answer = '<think>Say {"grade": 2}? Better.</think> {"grade": 9}'
    assert scorer(server, mode="words").judge(pairs(0.5)) == [0.9]
