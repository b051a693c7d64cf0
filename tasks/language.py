"""Language: the last characters of a text -> the next one.

References:
    J. Loverich, "Dynamic and Deep Nearest Neighbors in PyTorch".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset import Data, DataError
from options import Options, option
from run_folder import RunFolder
from tasks.task import Finding, Task
from utils import read_text_file

__all__ = [
    "LanguageTask",
    "TextEncoder",
    "TextOptions",
    "TextWindows",
    "build_text",
    "generate_text",
]


class TextEncoder:
    """Turn the last characters of a text into features. Characters are ASCII, 128 classes.

    Args:
        num_features: Characters that are looked at.
        encoding: "ascii": their codes, 0 … 127 (published); "onehot": one column for each position
            and character of the alphabet.
        alphabet: Codes that have a column in "onehot", ascending; others are all zeros.
        decay: "onehot" only: a character counts by this factor less than the one after it, so
            that recent characters decide which contexts are alike.
    """

    num_classes = 128

    def __init__(
        self, num_features: int, encoding: str, alphabet: Sequence[int], decay: float = 1.0
    ) -> None:
        self.num_features, self.encoding = num_features, encoding
        self.alphabet = list(alphabet)
        self.columns = torch.full((self.num_classes,), len(self.alphabet))  # the last: unknown
        self.columns[torch.tensor(self.alphabet, dtype=torch.int64)] = torch.arange(
            len(self.alphabet)
        )
        self.weights = decay ** torch.arange(num_features - 1, -1, -1, dtype=torch.float32)

    @property
    def width(self) -> int:
        """Number of features."""
        factor = len(self.alphabet) if self.encoding == "onehot" else 1
        return self.num_features * factor

    def encode(self, codes: Tensor) -> Tensor:
        """Encode windows of character codes: (B, num_features) -> (B, width) float32."""
        if self.encoding == "ascii":
            return codes.float()
        one_hot = F.one_hot(self.columns[codes.long()], len(self.alphabet) + 1)[..., :-1]
        return (one_hot * self.weights[:, None]).flatten(1)

    @staticmethod
    def codes(text: str) -> Tensor:
        """Return the codes of a text's ASCII characters; others are left out."""
        return torch.tensor(list(text.encode("ascii", "ignore")), dtype=torch.uint8)


class TextWindows(Dataset):
    """All places of a text: the characters before as features, and the next character's code.

    Args:
        codes: Character codes of the text, (N,) uint8.
        encoder: How windows are encoded.
    """

    def __init__(self, codes: Tensor, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.windows = codes.unfold(0, encoder.num_features, 1)[:-1]
        self.labels = codes[encoder.num_features :].long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch: features (B, D) and codes (B,)."""
        indices = torch.as_tensor(indices)
        return self.encoder.encode(self.windows[indices]), self.labels[indices]


def read_text(path: str, flag: str) -> str:
    """Read a text file (UTF-8).

    Args:
        path: The file.
        flag: The flag that named it, for messages.
    """
    try:
        return read_text_file(path)
    except ValueError as error:
        raise DataError(f"{flag}: {error}") from error


def build_text(
    *,
    text_path: str | None,
    test_text_path: str | None,
    num_features: int,
    text_encoding: str,
    text_decay: float,
    seed: int = 0,
) -> Data:
    """Load a text: the last characters -> the next one.

    Args:
        text_path: Training text; None takes the documentation that ships with Python.
        test_text_path: Test text; None takes the last tenth of the training text away for it.
        num_features: Characters that are looked at.
        text_encoding: See :class:`TextEncoder`.
        text_decay: See :class:`TextEncoder`.
        seed: Nothing is drawn at random.
    """
    notes = []
    if text_path is None:
        from pydoc_data.topics import topics

        train = "".join(topics[name] for name in sorted(topics))
        notes.append("Text: the documentation inside Python (--text_path chooses another).")
    else:
        train = read_text(text_path, "--text_path")
    if test_text_path is None:
        cut = len(train) - len(train) // 10
        train, test = train[:cut], train[cut:]
    else:
        test = read_text(test_text_path, "--test_text_path")
    codes = []
    for text, flag in ((train, "--text_path"), (test, "--test_text_path")):
        codes.append(TextEncoder.codes(text))
        left_out = len(text) - len(codes[-1])
        if left_out:
            notes.append(
                f"{flag}: {left_out:,} of {len(text):,} characters are not ASCII: left out."
            )
        if len(codes[-1]) <= num_features:
            raise DataError(
                f"{flag}: the text has {len(codes[-1])} characters, which is not enough to look at "
                f"{num_features} and predict the next. Use a longer text or fewer --num_features."
            )
    encoder = TextEncoder(num_features, text_encoding, codes[0].unique().tolist(), text_decay)
    return Data(
        name="text",
        task="language",
        train=TextWindows(codes[0], encoder),
        test=TextWindows(codes[1], encoder),
        sample_shape=(encoder.width,),
        num_outputs=encoder.num_classes,
        notes=notes,
        extra={"encoder": encoder},
    )


@torch.no_grad()
def generate_text(
    model: nn.Module,
    encoder: Any,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> str:
    """Continue a text character by character.

    Args:
        model: Maps encoded characters to scores of the next one.
        encoder: The text encoder the model was trained with.
        prompt: What to continue; if it is shorter than the encoder looks back, blanks are put
            before it.
        length: Characters to add.
        temperature: Scores are raised to 1 / temperature; 0 always takes the best character.
        seed: Seed of the choice.
        device: Where the model is.

    Returns:
        The prompt and what was added.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    codes = encoder.codes(prompt.rjust(encoder.num_features)).tolist()
    for _ in range(length):
        window = torch.tensor([codes[-encoder.num_features :]])
        scores = model(encoder.encode(window).to(device))[0].double().cpu()
        if temperature == 0:
            codes.append(int(scores.argmax()))
            continue
        logits = scores.clamp(min=1e-300).log() / temperature
        codes.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return prompt + "".join(map(chr, codes[len(codes) - length :])) if length else prompt


@dataclass(frozen=True)
class TextOptions(Options):
    """A text, and how much of it is looked at."""

    title = "Text (--dataset text)"
    text_path: str = option(None, "training text (default: Python's help)", kind=str)
    test_text_path: str = option(None, "test text (default: last tenth of --text_path)", kind=str)
    num_features: int = option(10, "characters that are looked at", least=1, most=1000)
    text_encoding: str = option(
        "ascii",
        "a character is its code (published), or a column of its own",
        choices=("ascii", "onehot"),
    )
    text_decay: float = option(
        1.0,
        "onehot: a character counts by this factor less than the one after it",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class LanguageOptions(Options):
    """A text to go on with."""

    title = "Language: generated text"
    text_prompt: str = option(None, "text to go on with, after training or --test_only", kind=str)
    text_prediction_length: int = option(100, "characters to add to it", least=0, most=10**6)
    text_temperature: float = option(
        1.0,
        "below 1 more certain, above 1 more varied; 0 takes the best character",
        least=0,
        most=1000,
    )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse a prompt outside the alphabet; say so if it is short."""
        prompt, looked_at = values["text_prompt"], values["num_features"]
        if prompt is None:
            return
        strange = sorted({c for c in prompt if not c.isascii()})
        if strange:
            raise ValueError(
                f"text_prompt holds characters outside the alphabet, which is ASCII: "
                f"{' '.join(strange)}. Replace them."
            )
        if len(prompt) < looked_at:
            print(
                f"note: --text_prompt has {len(prompt)} characters and "
                f"{looked_at} are looked at (--num_features): blanks are put before it."
            )


class LanguageTask(Task):
    """Scores of the next character; accuracy and bits per character.

    A score of 0 would cost infinitely many bits, so scores are mixed with `uniform` parts of an
    even distribution over all classes for that count.

    Args:
        text_prompt: Text to go on with when a run ends; None for none.
        text_prediction_length: Characters to add to it.
        text_temperature: Scores are raised to 1 / temperature; 0 takes the best character.
        seed: Seed of the choice.
        uniform: See above.
    """

    name = "language"
    headline, headline_name, headline_unit = "top1", "Accuracy", "%"
    Options = LanguageOptions

    def __init__(
        self,
        *,
        text_prompt: str | None = None,
        text_prediction_length: int = 100,
        text_temperature: float = 1.0,
        seed: int = 0,
        uniform: float = 0.01,
    ) -> None:
        super().__init__(seed=seed)
        self.prompt, self.length = text_prompt, text_prediction_length
        self.temperature, self.uniform = text_temperature, uniform

    def sizes(self, data: Data) -> dict[str, Any]:
        """Return the number of features and of characters."""
        return {"num_inputs": data.sample_shape[0], "num_classes": data.num_outputs}

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return 100 where the character is right and 0 elsewhere, and the bits it costs."""
        right = (outputs.argmax(dim=1) == targets).float() * 100
        scores = outputs.gather(1, targets[:, None])[:, 0].float()
        mixed = scores * (1 - self.uniform) + self.uniform / outputs.shape[1]
        return {"top1": right, "bits": -mixed.log2()}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        return f"Accuracy: {metrics['top1']:.4f}%, Bits per character: {metrics['bits']:.4f}"

    def show(self, model: nn.Module, data: Data, run: RunFolder) -> Finding:
        """Go on with the prompt, into ``generated.txt``."""
        if self.prompt is None:
            return Finding({}, [])
        text = generate_text(
            model,
            data.extra["encoder"],
            self.prompt,
            self.length,
            temperature=self.temperature,
            seed=self.seed,
            device=next(model.buffers()).device,
        )
        run.write_result("generated.txt", text)
        return Finding({"generated": text}, [f"Generated: {text!r}"])
