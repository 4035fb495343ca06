"""Write `ptb_tokens.json` and `caption_scores.json` anew, with the Java reference tools only (no code of ours).

Needs Java: `python tests/golden/make_metric_goldens.py`. The cases are the keys of the files that are there, so
add a key with any value to `ptb_tokens.json`, run this, and read the difference before keeping it.
"""

import json
import os
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

HERE = Path(__file__).parent


def tokenized(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    return PTBTokenizer().tokenize({key: [{"caption": c} for c in some] for key, some in captions.items()})


def tokens() -> dict[str, str]:
    texts = json.loads((HERE / "ptb_tokens.json").read_text(encoding="utf-8"))
    java = tokenized({text: [text] for text in texts})
    return {text: java[text][0] for text in texts}


def scores() -> dict[str, object]:
    corpus = json.loads((HERE / "caption_scores.json").read_text(encoding="utf-8"))
    images = corpus["images"]
    references = tokenized({key: image["references"] for key, image in images.items()})
    hypotheses = tokenized({key: [image["caption"]] for key, image in images.items()})
    bleu = Bleu(4).compute_score(references, hypotheses, verbose=0)[0]
    found = {f"bleu_{order}": score for order, score in enumerate(bleu, start=1)}
    for name, scorer in {"rouge_l": Rouge(), "cider": Cider(), "meteor": Meteor()}.items():
        found[name] = float(scorer.compute_score(references, hypotheses)[0])
    return {"images": images, "scores": found}


if __name__ == "__main__":
    os.environ["JAVA_TOOL_OPTIONS"] = "-Dfile.encoding=UTF-8"  # else the locale decides what an accent is
    for name, content in {"ptb_tokens": tokens(), "caption_scores": scores()}.items():
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
