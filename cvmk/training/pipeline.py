"""`cvmk train`: corpora, tokenizer, teacher, student, report. `train` reads like the list of what happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvmk.config import DistillationConfig, TrainConfig
from cvmk.config.schema import Recipe, check_packages
from cvmk.distill import DistillationObjective, check_vocabularies
from cvmk.errors import ConfigError, CvmkError, DivergedError
from cvmk.files import write_json
from cvmk.formats import describe_model, save_model_folder
from cvmk.nn import CVMTransformer, count_parameters
from cvmk.report.evaluations import write_evaluation
from cvmk.report.names import EVALUATIONS, HYPOTHESES
from cvmk.report.names import REPORT as PAGE
from cvmk.telemetry import AnomalyWatch, EventStream, Recorder, Reporter, ResourceWatch, RunLog, Subscriber, TelemetryDashboard, Terminal
from cvmk.telemetry.schema import Average, End, Start
from cvmk.text.batching import TokenBatchSampler
from cvmk.text.cache import TokenizedCorpus, over_long, tokenized
from cvmk.text.corpus import CorpusReport, ParallelCorpus
from cvmk.text.tokenizers import Tokenizer, load_tokenizer
from cvmk.training.averaging import WeightHistory
from cvmk.training.batches import Batches
from cvmk.training.checkpoint import CheckpointStore
from cvmk.training.contents import Content, contents_of
from cvmk.training.guard import DivergenceGuard
from cvmk.training.judge import blindness
from cvmk.training.materials import Corpora, load_corpora, prepare_tokenizer, teacher_translations
from cvmk.training.optimizers import build_optimizer
from cvmk.training.profile import WATCHED, StepProfiler
from cvmk.training.report import REPORT, Outcome, model_card, training_report, unknown_languages
from cvmk.training.run_folder import open_run
from cvmk.training.signals import StopSignal
from cvmk.training.state import TrainingState
from cvmk.training.step import TrainingStep
from cvmk.training.teacher import Teacher, is_trained, load_teacher, named_teacher
from cvmk.training.trainer import Trainer
from cvmk.training.world import World, current_world
from cvmk.validation import DistillationValidator, ValidationResult

Subscribers = Callable[[str, Path], Iterable[Subscriber]]
"""Who looks on while a model is trained, by its title ("teacher", "student", "model") and its folder."""


@dataclass(frozen=True)
class Job:
    """What every stage of a run needs to know."""

    config: TrainConfig
    folder: Path
    device: torch.device
    corpora: Corpora
    reporter: Reporter
    world: World
    subscribers: Subscribers
    stop: StopSignal
    profile: bool = False

    @property
    def cache(self) -> Path:
        return Path(self.config.data.cache) if self.config.data.cache else self.folder / "cache"


def train(
    config: TrainConfig,
    text: str,
    reporter: Reporter,
    *,
    resume: bool = False,
    restart: bool = False,
    subscribers: Subscribers | None = None,
    stop: StopSignal | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Run a training configuration (`text` is its TOML) to its report, which is also written to `training_report.json`.

    `subscribers` are asked for with each model that is trained, and hear its events; `stop` lets one of them, or another thread, end the run.
    With `profile` some iterations of each model are watched, and `profile/` in its folder says where their time went.
    Raises the errors of cvmk.errors, and Interrupted after Ctrl-C. A run that diverges after its last rollback has exported its best checkpoint before
    it raises DivergedError.
    """
    device = _device(config.run.device)
    check_packages(config)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    corpora = load_corpora(config.data)
    teacher = named_teacher(config.teacher, device)
    given = load_tokenizer(config.tokenizer.path) if config.tokenizer.path is not None else None
    with open_run(config, text, _contents(config, corpora, given, teacher), resume=resume, restart=restart) as folder:
        job = Job(config, folder, device, corpora, reporter, current_world(), subscribers or (lambda *model: ()), stop or StopSignal(), profile)
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
        found["teacher.path"] = Content(str(teacher.path), teacher.fingerprint, settled=teacher.finished)
    return found


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError('run.device = "cuda", but PyTorch finds no GPU here: set it to "auto" or "cpu"')
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


# -- one model ---------------------------------------------------------------------------------------------------------------
def _train_teacher(job: Job, tokenizer: Tokenizer) -> Teacher:
    """Train the teacher of the configuration in `teacher/` of the run's folder, unless an earlier start has finished it."""
    assert job.config.teacher is not None
    folder = job.folder / "teacher"
    if not is_trained(folder):
        folder.mkdir(exist_ok=True)
        _train_one(job, job.config.teacher, folder, "teacher", tokenizer, None)
    return load_teacher(folder, job.device)


def _train_one(job: Job, recipe: Recipe, folder: Path, title: str, tokenizer: Tokenizer, teacher: Teacher | None) -> dict[str, Any]:
    """Train, choose the weights, score them, and write the model and its report. Raises DivergedError after that where training gave up."""
    events, recorder = _events(job, folder, title)
    try:
        trainer, corpus = _trainer(job, recipe, folder, tokenizer, teacher, events, recorder)
        step = trainer.resume()
        trainer.validator.check_metric(refuse=step is None)
        parameters = count_parameters(trainer.state.model)
        events.emit(Start(title, parameters, len(corpus), step or 0, recipe.training.iterations, str(job.device)))
        if teacher is not None:
            events.emit(teacher.event())
        every = job.config.telemetry.resources_every
        with ResourceWatch(events, every, lambda: recorder.step) if every else contextlib.nullcontext():
            diverged = _diverged(trainer)
        report = training_report(
            job.config, recipe, title, trainer.state, corpus, _outcome(job, recipe, folder, trainer, teacher, diverged), teacher.facts() if teacher else None
        )
        save_model_folder(folder / "model", trainer.state.model.eval(), tokenizer, model_card(report), {"languages": job.config.data.languages})
        write_json(folder / REPORT, report)
        events.emit(End(report))
        if job.config.run.report and job.world.writes:
            _write_page(folder, recipe, events)
        if diverged is not None:
            raise DivergedError(
                f"{diverged}; the model in {folder / 'model'} is its {report['weights']}: "
                "try a smaller optimizer.learning_rate or a longer schedule.warmup, or --resume to go on from there with a smaller rate"
            )
        return report
    finally:
        events.close()


def _events(job: Job, folder: Path, title: str) -> tuple[EventStream, Recorder]:
    """What a run writes down, by `[telemetry]`, and whoever looks on."""
    config = job.config.telemetry
    lookers = [Terminal(job.reporter, title), *job.subscribers(title, folder)]
    if config.tensorboard or config.plots:
        lookers.append(TelemetryDashboard(folder, tensorboard=config.tensorboard, plots=config.plots, plots_every=config.plots_every))
    events = EventStream(RunLog(folder, config.log_bytes, config.log_files), lookers)  # last: nothing may fail while it is locked
    return events, Recorder(events, iterations=config.iterations, watch=AnomalyWatch(config.deviations) if config.anomalies else None)


def _trainer(
    job: Job, recipe: Recipe, folder: Path, tokenizer: Tokenizer, teacher: Teacher | None, events: EventStream, recorder: Recorder
) -> tuple[Trainer, TokenizedCorpus]:
    """The objects that a configuration stands for, and the corpus that is trained on."""
    config, training = job.config, recipe.training
    torch.manual_seed(config.run.seed)
    model = CVMTransformer(recipe.model, tokenizer.vocab_size, Tokenizer.PAD).to(job.device)
    objective = DistillationObjective(
        config.distillation if teacher is not None else DistillationConfig(alpha=0.0),
        label_smoothing=training.label_smoothing,
        student=recipe.model,
        teacher=teacher.model.config if teacher is not None else None,
        vocab_size=tokenizer.vocab_size,
    ).to(job.device)
    corpus = _training_corpus(job, tokenizer, teacher)
    optimizer = build_optimizer(recipe.optimizer, (model, objective))
    sampler = TokenBatchSampler(corpus.lengths, training.max_tokens, config.run.seed)
    state = TrainingState(
        model,
        objective,
        optimizer,
        Batches(corpus, sampler, training.accumulate, job.device, job.world),
        DivergenceGuard(recipe.guard),
        _validator(job, recipe, job.corpora.valid, "valid", folder, teacher, events),
    )
    step = TrainingStep(
        model, teacher.model if teacher is not None else None, objective, optimizer,
        precision=training.precision, clip_norm=training.clip_norm, world=job.world,
    )
    checkpoints, about = folder / "checkpoints", {"languages": config.data.languages}
    store = CheckpointStore(checkpoints, training.keep, lambda into: describe_model(into, model, tokenizer, about), job.world)
    profiler, telemetry = None, config.telemetry
    watched = telemetry.profile or (WATCHED if job.profile else 0)
    if watched and job.world.writes:
        adamw, dtype = recipe.optimizer.name == "adamw", getattr(torch, training.precision)
        parameters = sum(parameter.numel() for parameter in optimizer.parameters) if adamw else 0
        taught = teacher.model.config if teacher is not None and objective.needs_teacher else None
        profiler = StepProfiler(
            folder, recipe.model, taught, tokenizer.vocab_size, parameters, dtype, job.device, job.reporter.say, events.emit,
            skipped=telemetry.profile_after, watched=watched, trace_bytes=telemetry.profile_bytes,
        )  # fmt: skip
    averages = WeightHistory(checkpoints / "average", training.average)
    return Trainer(recipe, state, step, store, averages, tokenizer, events, recorder, job.stop, profiler), corpus


def _diverged(trainer: Trainer) -> str | None:
    """Train; why it gave up, where it did. Raises DivergedError where there is no checkpoint to fall back on."""
    try:
        trainer.train()
    except DivergedError as error:
        if trainer.validator.best is None:
            raise DivergedError(f"{error}, before any validation: try a smaller optimizer.learning_rate or a longer schedule.warmup") from error
        return str(error)
    return None


_SLOW = frozenset({"ter"})
"""Metrics that take minutes on large sets."""


def _write_page(folder: Path, recipe: Recipe, events: EventStream) -> None:
    """The report of the model in `folder`. It costs little, and a run does not fail for it: what goes wrong is noted."""
    from cvmk.report import figures_of, write_report

    try:
        options: dict[str, Any] = {"bootstrap": recipe.validation.bootstrap, "confidence": recipe.validation.confidence}
        figures = figures_of([folder], **options, as_recorded=_SLOW)
        write_report(figures, folder / PAGE)
    except Exception as error:
        with contextlib.suppress(CvmkError):
            events.note(f"no report was written ({type(error).__name__}: {error}): cvmk report {folder} tries again")


def _outcome(job: Job, recipe: Recipe, folder: Path, trainer: Trainer, teacher: Teacher | None, diverged: str | None) -> Outcome:
    """Leave the best weights in the trainer's model, and score them on the test set, where there is one. What was scored is kept in `evaluations/`."""
    result, chosen = _final_weights(trainer)
    scored = {"validation": (trainer.validator, result)}
    test = None
    if job.corpora.test is not None:
        validator = _validator(job, recipe, job.corpora.test, "test", None, teacher, trainer.events)
        test = validator.run(trainer.translator(), trainer.progress.step, on_long="truncate", scores=False)
        scored["test"] = (validator, test)
    for name, (judge, of) in scored.items() if job.world.writes else ():
        write_evaluation(folder / EVALUATIONS / f"{name}.jsonl", judge.sources, judge.references, of.hypotheses, judge.teacher_outputs)
    blind = blindness(trainer.validator.history)
    return Outcome(chosen, result, test, diverged, [blind] if blind else [])


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


def _validator(
    job: Job, recipe: Recipe, corpus: ParallelCorpus, name: str, folder: Path | None, teacher: Teacher | None, events: EventStream
) -> DistillationValidator:
    config = recipe.validation
    sources, references = corpus.sources, corpus.targets
    if name == "test":
        config = config.model_copy(update={"max_sentences": len(sources)})
    count = config.max_sentences
    outputs = None
    if teacher is not None:
        outputs = teacher_translations(teacher.translator(), teacher.fingerprint, sources[:count], config.beam_size, job.cache, name, job.reporter)
    history = folder / "validation_history.json" if folder is not None else None
    hypotheses = folder / HYPOTHESES if folder is not None else None
    language = job.config.data.target_language
    return DistillationValidator(config, sources[:count], references[:count], outputs, history, hypotheses, language, events.note)


def _final_weights(trainer: Trainer) -> tuple[ValidationResult, str]:
    """Leave the better of the best checkpoint and the average of the last ones in the trainer's model; its validation and name."""
    validator, best = trainer.validator, trainer.validator.best
    assert best is not None
    mean = trainer.averages.mean()
    if mean is not None:
        trainer.state.model.load_state_dict(mean)
        # a validator of its own: the history holds what training went through, once each
        averaged = validator.without_history().run(trainer.translator(), trainer.progress.step, on_long="truncate", scores=False)
        steps = ", ".join(map(str, trainer.averages.steps()))
        trainer.events.emit(Average.of(averaged.to_dict() | {"iterations": trainer.averages.steps()}))
        if validator.better(averaged, best):
            return averaged, f"average of the weights at iterations {steps}"
    trainer.state.model.load_state_dict(trainer.store.load(best.step).weights)
    return best, f"checkpoint at iteration {best.step}"
