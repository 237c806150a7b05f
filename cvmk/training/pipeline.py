"""`cvmk train`: corpora, tokenizer, teacher, student, report. `train` reads like the list of what happens."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvmk.config import DistillationConfig, TrainConfig
from cvmk.config.schema import Recipe
from cvmk.distill import DistillationObjective, check_vocabularies
from cvmk.errors import ConfigError, DataError
from cvmk.files import read_json, write_json
from cvmk.formats import load_model_folder, resolve_model_folder, save_model_folder
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer, count_parameters
from cvmk.telemetry import Reporter, RunLog
from cvmk.text.cache import TokenizedCorpus, over_long, tokenized
from cvmk.text.corpus import CorpusReport, ParallelCorpus
from cvmk.text.tokenizers import Tokenizer, load_tokenizer
from cvmk.training.contents import Content, contents_of
from cvmk.training.materials import Corpora, load_corpora, prepare_tokenizer, teacher_translations
from cvmk.training.report import model_card, training_report, unknown_languages
from cvmk.training.run_folder import open_run
from cvmk.training.trainer import Trainer
from cvmk.validation import DistillationValidator, ValidationResult

REPORT = "training_report.json"


@dataclass(frozen=True)
class Teacher:
    """A finished model to distil, and a name for its weights."""

    model: CVMTransformer
    tokenizer: Tokenizer
    path: Path
    fingerprint: str

    def translator(self) -> Translator:
        return Translator.from_model(self.model, self.tokenizer)


@dataclass(frozen=True)
class Job:
    """What every stage of a run needs to know."""

    config: TrainConfig
    folder: Path
    device: torch.device
    corpora: Corpora
    reporter: Reporter

    @property
    def cache(self) -> Path:
        return Path(self.config.data.cache) if self.config.data.cache else self.folder / "cache"


def train(config: TrainConfig, text: str, reporter: Reporter, *, resume: bool = False, restart: bool = False) -> dict[str, Any]:
    """Run a training configuration (`text` is its TOML) to its report, which is also written to `training_report.json`.

    Raises the errors of cvmk.errors, and Interrupted after Ctrl-C.
    """
    device = _device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    corpora = load_corpora(config.data)
    teacher = _finished_teacher(config, device)
    given = load_tokenizer(config.tokenizer.path) if config.tokenizer.path is not None else None
    with open_run(config, text, _contents(config, corpora, given, teacher), resume=resume, restart=restart) as folder:
        job = Job(config, folder, device, corpora, reporter)
        for corpus in (corpora.train, corpora.valid, corpora.test):
            if corpus is not None:
                reporter.say(corpus.report.describe(corpus.name))
        if unknown := unknown_languages(config.data.source_language, config.data.target_language):
            reporter.say(unknown)
        tokenizer = given or (teacher.tokenizer if teacher is not None else None)
        if tokenizer is None:
            tokenizer = prepare_tokenizer(config.tokenizer, corpora.train, folder / "tokenizer", config.run.seed, reporter)
        if teacher is not None:
            check_vocabularies(tokenizer, teacher.tokenizer)
        elif config.teacher is not None:
            teacher = _train_teacher(job, tokenizer)
        return _train_one(job, config, folder, "student" if teacher is not None else "model", tokenizer, teacher)


def _contents(config: TrainConfig, corpora: Corpora, tokenizer: Tokenizer | None, teacher: Teacher | None) -> dict[str, Content]:
    """What the run reads from outside of its folder."""
    found = contents_of((corpora.train, corpora.valid, corpora.test))
    if tokenizer is not None:
        found["tokenizer.path"] = Content(str(config.tokenizer.path), tokenizer.fingerprint)
    if teacher is not None:
        found["teacher.path"] = Content(str(teacher.path), teacher.fingerprint, settled=_is_finished(teacher))
    return found


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError('run.device = "cuda", but PyTorch finds no GPU here: set it to "auto" or "cpu"')
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


# -- the teacher -------------------------------------------------------------------------------------------------------------
def _finished_teacher(config: TrainConfig, device: torch.device) -> Teacher | None:
    """The teacher that the configuration names by path; None where it is to be trained, or where there is none."""
    if config.teacher is None or config.teacher.path is None:
        return None
    return _load_teacher(Path(config.teacher.path), device)


def _load_teacher(path: Path, device: torch.device) -> Teacher:
    model, tokenizer, _ = load_model_folder(path)
    model = model.float().to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Teacher(model, tokenizer, path, _fingerprint(model))


def _fingerprint(model: CVMTransformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _train_teacher(job: Job, tokenizer: Tokenizer) -> Teacher:
    """Train the teacher of the configuration in `teacher/` of the run's folder, unless an earlier start has finished it."""
    assert job.config.teacher is not None
    folder = job.folder / "teacher"
    if not (folder / REPORT).exists():
        folder.mkdir(exist_ok=True)
        _train_one(job, job.config.teacher, folder, "teacher", tokenizer, None)
    return _load_teacher(folder, job.device)


# -- one model ---------------------------------------------------------------------------------------------------------------
def _train_one(job: Job, recipe: Recipe, folder: Path, title: str, tokenizer: Tokenizer, teacher: Teacher | None) -> dict[str, Any]:
    config = job.config
    distillation = config.distillation if teacher is not None else DistillationConfig(alpha=0.0)
    log = RunLog(folder)
    try:
        torch.manual_seed(config.run.seed)
        model = CVMTransformer(recipe.model, tokenizer.vocab_size, Tokenizer.PAD).to(job.device)
        objective = DistillationObjective(
            distillation,
            label_smoothing=recipe.training.label_smoothing,
            student=recipe.model,
            teacher=teacher.model.config if teacher is not None else None,
            vocab_size=tokenizer.vocab_size,
        ).to(job.device)
        corpus = _training_corpus(job, tokenizer, teacher)
        trainer = Trainer(
            recipe,
            folder=folder,
            seed=config.run.seed,
            model=model,
            teacher=teacher.model if teacher is not None else None,
            objective=objective,
            corpus=corpus,
            tokenizer=tokenizer,
            validator=_validator(job, recipe, job.corpora.valid, "valid", folder, teacher),
            log=log,
            reporter=job.reporter,
            title=title,
            languages=config.data.languages,
        )
        step = trainer.resume()
        trainer.validator.check_metric(refuse=step is None)
        parameters = count_parameters(model)
        resumed = f", resumed at iteration {step}" if step else ""
        job.reporter.say(f"{title}: {parameters / 1e6:.2f} M parameters on {job.device}, {len(corpus)} pairs, {recipe.training.iterations} iterations{resumed}")
        log.event("start", title=title, parameters=parameters, pairs=len(corpus), step=step or 0)
        if teacher is not None:
            _tell_teacher(teacher, log, job.reporter)
        trainer.train()
        final, chosen = _final_weights(trainer)
        test = None
        if job.corpora.test is not None:
            validator = _validator(job, recipe, job.corpora.test, "test", None, teacher)
            test = validator.run(trainer.translator(), trainer.progress.step, on_long="truncate")
        report = training_report(
            config, recipe, title, trainer, parameters=parameters, corpus=corpus, final=final, chosen=chosen, test=test,
            teacher=_teacher_facts(teacher),
        )
        save_model_folder(folder / "model", model.eval(), tokenizer, model_card(report), {"languages": trainer.languages})
        write_json(folder / REPORT, report)
        log.event("end", report=report)
        return report
    finally:
        log.close()


def _training_corpus(job: Job, tokenizer: Tokenizer, teacher: Teacher | None) -> TokenizedCorpus:
    data, sequence = job.config.data, job.config.distillation.sequence_level
    corpus = job.corpora.train
    if teacher is not None and sequence.enabled:
        outputs = teacher_translations(teacher.translator(), teacher.fingerprint, corpus.sources, sequence.beam_size, job.cache, "train", job.reporter)
        sizes = zip(map(len, tokenizer.encode_many(corpus.sources)), map(len, tokenizer.encode_many(outputs)), strict=True)
        # a teacher may say nothing, or not stop
        usable = [target > 0 and not over_long(source, target, data.max_tokens_per_sentence, data.max_length_ratio) for source, target in sizes]
        kept = [pair for pair, good in zip(zip(corpus.sources, outputs, strict=True), usable, strict=True) if good]
        pairs = kept if sequence.mix == "replace" else [*zip(corpus.sources, corpus.targets, strict=True), *kept]
        job.reporter.say(f"sequence-level distillation: {len(kept)} of {len(outputs)} translations of the teacher are usable, {len(pairs)} pairs in all")
        name, report = f"{corpus.name} with the teacher's translations", CorpusReport(read=len(pairs), kept=len(pairs))
        corpus = ParallelCorpus([s for s, _ in pairs], [t for _, t in pairs], name, report)
    found = tokenized(corpus, tokenizer, job.cache, data.max_tokens_per_sentence, data.max_length_ratio, data.on_bad_line)
    if found.report.skipped:
        job.reporter.say(found.report.describe(corpus.name))
    return found


def _validator(job: Job, recipe: Recipe, corpus: ParallelCorpus, name: str, folder: Path | None, teacher: Teacher | None) -> DistillationValidator:
    config = recipe.validation
    sources, references = corpus.sources, corpus.targets
    if name == "test":
        config = config.model_copy(update={"max_sentences": len(sources)})
    count = config.max_sentences
    outputs = None
    if teacher is not None:
        outputs = teacher_translations(teacher.translator(), teacher.fingerprint, sources[:count], config.beam_size, job.cache, name, job.reporter)
    history = folder / "validation_history.json" if folder is not None else None
    hypotheses = folder / "hypotheses" if folder is not None else None
    language = job.config.data.target_language
    return DistillationValidator(config, sources[:count], references[:count], outputs, history, hypotheses, language, job.reporter.say)


def _final_weights(trainer: Trainer) -> tuple[ValidationResult, str]:
    """Leave the better of the best checkpoint and the average of the last ones in the trainer's model; its validation and name."""
    validator, best = trainer.validator, trainer.validator.best
    assert best is not None
    mean = trainer.averages.mean()
    if mean is not None:
        trainer.model.load_state_dict(mean)
        # a validator of its own: the history holds what training went through, once each
        averaged = validator.without_history().run(trainer.translator(), trainer.progress.step, on_long="truncate")
        steps = ", ".join(map(str, trainer.averages.steps()))
        trainer.log.event("average", iterations=trainer.averages.steps(), **averaged.to_dict())
        if validator.better(averaged, best):
            return averaged, f"average of the weights at iterations {steps}"
    trainer.model.load_state_dict(trainer.store.load(best.step).weights)
    return best, f"checkpoint at iteration {best.step}"


def _is_finished(teacher: Teacher) -> bool:
    return resolve_model_folder(teacher.path).parent != teacher.path / "checkpoints"


def _tell_teacher(teacher: Teacher, log: RunLog, reporter: Reporter) -> None:
    """Which weights teach. A run that is not finished lends those of its best checkpoint, which may change as it goes on."""
    weights = resolve_model_folder(teacher.path)
    finished = _is_finished(teacher)
    if not finished:
        text = f"the teacher's run {teacher.path} is not finished: its best checkpoint ({weights.name}) teaches"
        reporter.say(text)
        log.line(text)
    log.event("teacher", path=str(teacher.path), weights=str(weights.resolve()), fingerprint=teacher.fingerprint, finished=finished)


def _teacher_facts(teacher: Teacher | None) -> dict[str, Any] | None:
    if teacher is None:
        return None
    facts: dict[str, Any] = {"path": str(teacher.path), "fingerprint": teacher.fingerprint, "parameters": count_parameters(teacher.model)}
    folder = resolve_model_folder(teacher.path)
    if folder.name == "model":  # of a finished run
        with contextlib.suppress(DataError, KeyError, TypeError):  # a damaged report of the teacher must not cost the student
            found = read_json(folder.parent / REPORT)
            return facts | {"validation": found["validation"]["scores"], "test": found["test"]["scores"] if found["test"] else None}
    return facts
