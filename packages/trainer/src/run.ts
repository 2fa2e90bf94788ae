/** @file One call of `train`: the loop around its steps, with checkpoints, measurements, events and the result. */
import {
  concat,
  eventLoopTurn,
  globalNorm,
  MoeError,
  type NamedParameter,
  namedAdapters,
  namedStreams,
  noGrad,
  parameterCount,
  QuantizedParameter,
  scope,
  shown,
  weightBytes,
} from '@moe/core'
import type { Averages } from './averages.ts'
import { OptimizerOnRanks } from './checkpoints/optimizer-on-ranks.ts'
import { type RunFolder, runFolder } from './checkpoints/run-folder.ts'
import { loadTraining, saveTraining } from './checkpoints/save-load.ts'
import type { RunRecord } from './checkpoints/trainer-state.ts'
import { DatasetLessons, type Lessons } from './data/lessons.ts'
import { sourcesOf } from './data/mixture.ts'
import { TrainingOrder } from './data/training-order.ts'
import { drawApart } from './draw-apart.ts'
import type { Evaluation } from './evaluate.ts'
import type { EvaluationEvent, StepEvent, TrainEvent, TrainListener, TrainReporter } from './events.ts'
import { peakResidentBytes } from './host.ts'
import type { Interrupts } from './interrupt.ts'
import type { TokenBatch, TrainableModel } from './model.ts'
import { StepsOnRanks } from './model-on-ranks.ts'
import { nonFiniteModel } from './non-finite.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { scheduled } from './optim/schedule.ts'
import { isJudged, type ResolvedOptions, recordRun, type TokenData } from './options.ts'
import { checkSameStart, gatherNumbers, gatherValues, type Ranks, type Start } from './ranks.ts'
import { LoadSums } from './report/loads-log.ts'
import { type MetricsLine, metricsLine } from './report/metrics-log.ts'
import { progress } from './report/progress.ts'
import type { TrainResult } from './result.ts'
import { PreferenceLessons } from './rewards/preference-lessons.ts'
import type { Preferences } from './rewards/preferences.ts'
import { RolloutLessons } from './rewards/rollout-lessons.ts'
import type { Rollouts } from './rewards/rollouts.ts'
import { checkSampling } from './rewards/sampler.ts'
import { TextRanks } from './rewards/text-ranks.ts'
import type { SharedUpdate } from './shared-update.ts'
import type { Steps } from './step-numbers.ts'
import { TrainingSteps } from './training-steps.ts'

const nothingMeasured: Evaluation = { loss: Number.NaN, bitsPerByte: Number.NaN, tokens: 0, seconds: 0 }

/** What a measurement of weights and averages came to. */
type Measured = Evaluation & Pick<EvaluationEvent, 'ema'>

type Peaks = Pick<TrainResult, 'peakMemoryBytes' | 'peakDeviceBytes'>

/** One call of `train`. */
export class Run {
  readonly model: TrainableModel
  readonly settings: ResolvedOptions
  readonly lessons: Lessons
  readonly parameters: readonly NamedParameter[]
  readonly optimizer: Optimizer
  /** Of the weights, where they are wanted. */
  readonly averages: Averages | undefined
  /** Where each rank has its share of it. */
  readonly shared: SharedUpdate | undefined
  readonly steps: Steps
  readonly interrupts: Interrupts
  readonly record: RunRecord
  readonly listeners: readonly TrainListener[]
  /** Of the run, where it has one. */
  readonly folder: RunFolder | undefined
  /** The same on the rank that writes to it. */
  readonly writesTo: RunFolder | undefined
  /** The optimizer as checkpoints have it, where ranks have parts of it. */
  optimizerOnRanks: OptimizerOnRanks | undefined
  /** Whether there are checkpoints, be it of another rank. */
  saves: boolean
  /** Steps done when the model was last made whole. */
  gatheredStep = -1
  /** Since loads were last told. */
  readonly loads = new LoadSums()
  /** Lines of the last tenth of the steps done, for the result. */
  readonly tail: MetricsLine[] = []
  /** What the model's `afterStep` returns. */
  readonly balanceNames = new Set<string>()
  /** Batches of the next step, made ready. */
  ahead: readonly TokenBatch[] | null = null
  /** What listeners that take their time are at. */
  readonly listening: Promise<unknown>[] = []
  /** Steps done. */
  step = 0
  tokens = 0
  trainSeconds = 0
  /** In earlier processes. */
  peaksBefore: Peaks = { peakMemoryBytes: 0, peakDeviceBytes: 0 }
  savedStep = -1
  checkpoint: string | undefined
  /** What listeners add to the run. */
  readonly reporter: TrainReporter = {
    notify: message => this.emit({ type: 'notice', message }),
    log: values => this.emit({ type: 'log', step: this.step, values: checkedNumbers(values) }),
  }
  /** Gives the folder back. */
  unlock = () => {}
  drawTogether = () => {}

  constructor(
    model: TrainableModel,
    settings: ResolvedOptions,
    data: TokenData | Rollouts | Preferences,
    parameters: readonly NamedParameter[],
    { optimizer, shared }: { readonly optimizer: Optimizer; readonly shared?: SharedUpdate },
    averages: Averages | undefined,
    interrupts: Interrupts,
  ) {
    this.model = model
    this.settings = settings
    this.parameters = parameters
    this.optimizer = optimizer
    this.averages = averages
    this.shared = shared
    const { clip, precision, record, ranks, onRanks, rank } = settings
    this.steps =
      onRanks === undefined
        ? new TrainingSteps(model, parameters, optimizer, { clip, precision, record, ranks, share: shared?.share })
        : new StepsOnRanks(model, onRanks, optimizer, { clip, precision })
    this.interrupts = interrupts
    const together = { ranks, like: parameters[0].parameter, save: () => this.save() }
    this.lessons = lessonsOf(model, settings, data, new TextRanks(together), interrupts.signal)
    this.record = recordRun(settings, this.lessons, model, parameters, optimizer)
    this.folder = settings.out === undefined ? undefined : runFolder(settings.out)
    this.writesTo = (ranks?.rank ?? rank) === 0 ? this.folder : undefined
    this.saves = this.writesTo !== undefined
    const draw = settings.progress ?? (ranks === undefined || ranks.rank === 0)
    this.listeners = [
      ...(draw === false ? [] : [draw === true ? progress() : draw]),
      ...(this.writesTo?.listeners ?? []),
      ...(settings.onEvent === undefined ? [] : [settings.onEvent]),
    ]
  }

  get log() {
    return this.writesTo?.log
  }

  get backend() {
    return this.parameters[0].parameter.backend
  }

  get peaks(): Peaks {
    const { peakMemoryBytes, peakDeviceBytes } = this.peaksBefore
    return {
      peakMemoryBytes: Math.max(peakMemoryBytes, peakResidentBytes()),
      peakDeviceBytes: Math.max(peakDeviceBytes, this.backend.stats().peakBytes),
    }
  }

  /** Ranks that train together. */
  get size(): number {
    return this.settings.ranks === undefined ? 1 : this.settings.world
  }

  /** Positions of the whole run, where they are known beforehand; else 0. */
  get tokensInAll(): number {
    const { lessons, settings, step, size } = this
    const all = lessons.tokensIn(settings.steps)
    // What was done so far may have been done in other batches.
    return all === 0 ? 0 : this.tokens + (all - lessons.tokensIn(step)) * size
  }

  async all(): Promise<TrainResult> {
    const { settings, lessons } = this
    const { ranks, onRanks } = settings
    const parts = onRanks ?? (this.shared && { ranks: this.shared.ranks, parameters: this.shared.share.parameters })
    if (parts !== undefined) this.optimizerOnRanks = await OptimizerOnRanks.of(parts, this.optimizer, this.backend)
    await this.begin()
    if (ranks !== undefined) await this.agree(ranks)
    this.emitStart()
    await this.heard()
    if (ranks !== undefined && onRanks === undefined) this.drawTogether = drawApart(ranks, this.model)
    const limit = this.trainSeconds + (settings.timeLimitSeconds ?? Number.POSITIVE_INFINITY)
    let stop = await this.reasonToStop(limit)
    while (this.step < settings.steps && stop === null) {
      if (!(await this.oneStep())) {
        stop = 'interrupted'
        break
      }
      if (this.step === settings.steps) break
      if (this.step % lessons.stride > 0) continue
      // The first whole ones from there on.
      const due = (every: number) => every > 0 && this.step % every < lessons.stride
      if (due(settings.checkpointEvery)) await this.save()
      if (due(settings.evalEvery)) await this.measure(settings.evalTokens)
      stop = await this.reasonToStop(limit)
    }
    await this.save()
    if (stop !== null && this.step < settings.steps) return this.stopped(stop)
    const validation = await this.measure(undefined)
    if (validation === null) return this.stopped('interrupted')
    return this.finish('finished', validation)
  }

  /** Why no further step is taken, the same on all ranks. */
  async reasonToStop(limit: number): Promise<'interrupted' | 'time' | null> {
    const { ranks } = this.settings
    const own = [Number(this.interrupts.signal.aborted), Number(this.trainSeconds >= limit)]
    const all = ranks === undefined ? [own] : await gatherNumbers(ranks, own, this.parameters[0].parameter)
    if (all.some(([interrupted]) => interrupted === 1)) return 'interrupted'
    return all.some(([, late]) => late === 1) ? 'time' : null
  }

  /** What the ranks have to know of each other. */
  async agree(ranks: Ranks): Promise<void> {
    const { settings, step, lessons, parameters } = this
    const { steps, checkpointEvery, evalEvery } = settings
    const judged = isJudged(settings.data) && { data: lessons.identity, seed: settings.seed }
    const plan = { steps, checkpointEvery, evalEvery, validation: lessons.validationTokens > 0, ...judged }
    // Where ranks have parts, what others train is freed.
    const norms = await normsOf(parameters.filter(({ parameter }) => parameter.handle !== null))
    const own = { step, plan, norms, saves: this.saves }
    const starts = await gatherValues<Start & { saves: boolean }>(ranks, own, parameters[0].parameter)
    checkSameStart(starts)
    this.saves = starts[0].saves
  }

  /** Makes the folder ready, and goes back to the checkpoint if there is one to go on from. */
  async begin(): Promise<void> {
    const { folder, writesTo } = this
    if (folder === undefined) return
    const { resume = false, allowChanges = false, overwrite = false } = this.settings
    const latest = await folder.latest()
    const from =
      typeof resume === 'string' && resume !== 'auto' ? await folder.named(resume) : resume ? latest : undefined
    if (resume === true && from === undefined) {
      throw new MoeError({
        code: 'E_CHECKPOINT',
        op: 'train',
        problem: `there is no checkpoint to resume from in ${folder.path}`,
        fix: "begin without resume, or pass resume: 'auto'",
      })
    }
    if (from === undefined && latest !== undefined && !overwrite) {
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'train',
        problem: `${folder.path} already holds a run (${latest.path})`,
        fix: 'go on with resume: true, choose another out, or begin anew with overwrite: true',
      })
    }
    if (writesTo !== undefined) this.unlock = writesTo.lock()
    if (from === undefined) {
      await writesTo?.empty()
      return
    }
    const state = await loadTraining(folder, from, this.parts, allowChanges ? null : this.record)
    this.step = state.step
    if (this.model.step !== undefined) this.model.step = state.modelStep ?? state.step
    this.tokens = state.tokens
    this.trainSeconds = state.trainSeconds
    this.peaksBefore = state
    this.savedStep = state.step
    this.checkpoint = from.path
    for (const name of state.balance ?? []) this.balanceNames.add(name)
    for (const { name, random } of namedStreams(this.model)) Object.assign(random, state.streams?.[name])
    for (const line of (await writesTo?.cutBack(state.step)) ?? []) this.remember(line)
  }

  /** @returns false when it was interrupted before the step began */
  async oneStep(): Promise<boolean> {
    const { settings, lessons } = this
    const started = performance.now()
    const lr = settings.lr * scheduled(settings.schedule, this.step)
    const batches = this.ahead ?? (await lessons.step(this.step))
    if (batches === null) return false
    this.ahead = null
    const done = this.steps.step(batches, { lr, step: this.step + 1 })
    // While the device computes. What `step` failed with is told below.
    done.catch(() => undefined)
    if (this.step + 1 < settings.steps) {
      this.ahead = lessons.ahead(this.step + 1)
      if (this.ahead) this.steps.prepare(this.ahead)
    }
    const numbers = await done
    this.averages?.update()
    // A turn of the event loop, so that Ctrl-C is seen even where no download waits.
    await eventLoopTurn()
    const seconds = (performance.now() - started) / 1000
    const tokens = lessons.tokensOf(this.step) * this.size
    this.step++
    this.trainSeconds += seconds
    this.tokens += tokens
    const event: StepEvent = {
      type: 'step',
      step: this.step,
      loss: numbers.loss,
      nll: numbers.nll,
      lr,
      gradNorm: numbers.gradNorm,
      tokens: this.tokens,
      tokensPerSecond: tokens / seconds,
      metrics: { ...lessons.metrics, ...numbers.metrics, ...numbers.after },
    }
    for (const name in numbers.after) this.balanceNames.add(name)
    const line = metricsLine(event)
    this.log?.line(line)
    this.remember(line)
    this.emit(event)
    const { loadsEvery } = settings
    if (loadsEvery > 0) this.loads.add(this.model.layerLoads)
    if (this.step % loadsEvery === 0) await this.tellLoads()
    await this.heard()
    return true
  }

  /** Tells what the experts were given since the last time. */
  async tellLoads(options = { biases: true }): Promise<void> {
    const event = await this.loads.take(this.step, options)
    if (event !== null) this.emit(event)
  }

  /** @returns null when it was interrupted */
  async measure(limit: number | undefined): Promise<Measured | null> {
    const { lessons, interrupts } = this
    if (lessons.validationTokens === 0) return nothingMeasured
    this.log?.flush()
    await this.gather()
    const { signal } = interrupts
    const parts = this.averages === undefined ? 1 : 2
    const measure = (part: number) => {
      const onProgress = (done: number) =>
        this.emit({ type: 'measuring', step: this.step, done: (part + done) / parts })
      return lessons.measure({ limit, signal, onProgress })
    }
    const ofWeights = await measure(0)
    // Also where this rank alone was interrupted: the others need it to have the whole model.
    const ofAverages = await this.averages?.during(async () => (ofWeights === null ? null : measure(1)))
    if (ofWeights === null || ofAverages === null) return null
    const measured = { ...ofWeights, ...(ofAverages && { ema: ofAverages }) }
    this.emit({ type: 'evaluation', step: this.step, final: limit === undefined, ...measured })
    await this.heard()
    return measured
  }

  async save(): Promise<void> {
    const { settings, step, tokens, trainSeconds, writesTo } = this
    // Of a run that goes on from here, nothing is missing.
    await this.tellLoads()
    if (!this.saves || this.savedStep === step) return
    const started = performance.now()
    this.log?.flush()
    await this.gather()
    await this.checkFinite()
    this.savedStep = step
    if (writesTo === undefined) {
      await this.averages?.during(async () => {})
      await this.optimizerOnRanks?.send()
      return
    }
    const balance = [...this.balanceNames]
    const streams = Object.fromEntries(namedStreams(this.model).map(({ name, random }) => [name, { ...random }]))
    const ofModel = { modelStep: this.model.step, balance, streams }
    const averagedSteps = this.averages?.steps
    const state = { step, tokens, trainSeconds, ...this.peaks, ...ofModel, averagedSteps, run: this.record }
    const { path } = await saveTraining(writesTo, this.parts, state, settings.keepCheckpoints)
    this.checkpoint = path
    this.emit({ type: 'checkpoint', step, path, seconds: (performance.now() - started) / 1000 })
    await this.heard()
  }

  get parts() {
    const { data, tokenizer, bos, eos } = this.settings
    const template = 'template' in data ? data.template : undefined
    const optimizer = this.optimizerOnRanks ?? this.optimizer
    return { model: this.model, optimizer, averages: this.averages, tokenizer, template, around: { bos, eos } }
  }

  /** Makes the model whole where ranks have parts of it. */
  async gather(): Promise<void> {
    if (this.gatheredStep === this.step) return
    await this.settings.onRanks?.gather()
    this.gatheredStep = this.step
  }

  /**
   * An update can make a weight infinite although its gradient was finite: such a model must not replace a good
   * checkpoint.
   */
  async checkFinite(): Promise<void> {
    if (Number.isFinite(await this.norm())) return
    throw await nonFiniteModel(this.model, this.step)
  }

  /** Norm of all weights. */
  async norm(): Promise<number> {
    const weights = this.parameters.flatMap(({ parameter }) => (parameter.dtype === 'f32' ? [parameter] : []))
    const norm = noGrad(() => globalNorm(weights))
    const value = await norm.item()
    norm.dispose()
    return value
  }

  async stopped(reason: 'interrupted' | 'time'): Promise<TrainResult> {
    const { step, checkpoint } = this
    this.emit({ type: 'stop', reason, step, steps: this.settings.steps, checkpoint })
    return this.finish(reason, nothingMeasured)
  }

  async finish(stopped: TrainResult['stopped'], { ema, ...validation }: Measured): Promise<TrainResult> {
    const { settings, backend, tail } = this
    await this.gather()
    const result: TrainResult = {
      steps: this.step,
      interrupted: stopped === 'interrupted',
      stopped,
      backend: backend.name,
      device: backend.device,
      precision: settings.precision,
      parameters: parameterCount(this.model),
      tokens: this.tokens,
      tokensPerSecond: this.trainSeconds > 0 ? this.tokens / this.trainSeconds : Number.NaN,
      trainSeconds: this.trainSeconds,
      ...this.sources(this.step),
      trainingLoss: mean(tail.map(({ nll }) => nll)),
      validation,
      ...(ema && { ema }),
      balance: Object.fromEntries(
        [...this.balanceNames].map(name => [name, mean(tail.flatMap(line => line[name] ?? []))]),
      ),
      ...this.peaks,
      checkpoint: this.checkpoint,
    }
    await this.log?.close()
    await this.writesTo?.summarize(result)
    this.emit({ type: 'end', result })
    await this.heard()
    return result
  }

  /** What the first `steps` steps take from each source, where there are several. */
  sources(steps: number): Pick<TrainResult, 'sources'> {
    const sources = this.lessons.sources?.(steps) ?? []
    if (sources.length === 0) return {}
    const told = sources.map(({ name, data, share, windows, epochs }) => {
      return [name, { size: data.length, share, tokens: windows * this.settings.sequenceLength, epochs }]
    })
    return { sources: Object.fromEntries(told) }
  }

  remember(line: MetricsLine): void {
    const { tail } = this
    tail.push(line)
    while (tail[0].step <= line.step * 0.9) tail.shift()
  }

  emit(event: TrainEvent): void {
    for (const listener of this.listeners) {
      const told = listener(event, this.reporter)
      if (!(told instanceof Promise)) continue
      told.catch(() => undefined) // What it fails with is thrown where it is awaited.
      this.listening.push(told)
    }
  }

  /** Waits for the listeners that take their time. @throws what one of them fails with */
  async heard(): Promise<void> {
    while (this.listening.length > 0) await this.listening.shift()
  }

  /** Numbers that the model stands for, and those of them in weights that cannot be trained. */
  storedNumbers() {
    const sum = (of: readonly NamedParameter[]) =>
      of.reduce((total, { parameter }) => total + weightBytes(parameter).elements, 0)
    const stored = this.parameters.filter(({ parameter }) => parameter instanceof QuantizedParameter)
    return { stored: sum(stored), all: sum(this.parameters) }
  }

  emitStart(): void {
    const { settings, lessons, backend } = this
    this.emit({
      type: 'start',
      backend: backend.name,
      device: backend.device,
      precision: settings.precision,
      parameters: parameterCount(this.model),
      steps: settings.steps,
      fromStep: this.step,
      tokensPerStep: lessons.tokensOf(this.step) * this.size,
      tokens: this.tokensInAll,
      ...(lessons.textsPerStep > 0 && { textsPerStep: lessons.textsPerStep }),
      trainingTokens: lessons.trainingTokens,
      validationTokens: lessons.validationTokens,
      epochs: lessons.epochs(settings.steps),
      ...this.sources(settings.steps),
      out: this.folder?.path,
      rank: settings.rank,
      settings: this.record,
    })
    const { stored, all } = this.storedNumbers()
    const adapters = namedAdapters(this.model).length
    if (adapters > 0) {
      const trained = parameterCount(this.model)
      const inFewerBits = stored > 0 ? `, ${((100 * stored) / (all - trained)).toFixed(1)} % of them in fewer bits` : ''
      this.emit({
        type: 'notice',
        message: `the adapters of ${adapters} weights are trained, ${trained} numbers; the ${all - trained} of the model stay as they are${inFewerBits}`,
      })
    } else if (stored > 0) {
      this.emit({
        type: 'notice',
        message: `${((100 * stored) / all).toFixed(1)} % of the model's numbers are stored in fewer bits and stay as they are: only the others are trained (to train all, open the model in f32)`,
      })
    }
    for (const message of lessons.notices) this.emit({ type: 'notice', message })
    const missing =
      settings.precision === 'fp8' && !backend.fp8Matmul
        ? 'does not round to fp8'
        : settings.precision === 'bf16' && !backend.bf16Matmul
          ? 'has no bf16 arithmetic here'
          : undefined
    if (missing !== undefined) {
      const used = settings.precision === 'fp8' && backend.bf16Matmul ? 'bf16' : 'f32'
      this.emit({ type: 'notice', message: `${backend.name} ${missing}: matrix products are multiplied in ${used}` })
    }
  }
}

function lessonsOf(
  model: TrainableModel,
  settings: ResolvedOptions,
  data: TokenData | Rollouts | Preferences,
  ranks: TextRanks,
  signal: AbortSignal,
): Lessons {
  const { sequenceLength, batchSize, accumulate, seed, rank, world, precision, tokenizer, bos } = settings
  const isolates = model.isolates === true
  if (isJudged(data)) {
    const isolate = settings.isolate ?? isolates
    const options = { sequenceLength, batchSize, isolate, tokenizer, bos, seed, precision, ranks }
    if ('beta' in data) return new PreferenceLessons(model, data, options)
    return new RolloutLessons(checkSampling(model), data, { ...options, signal })
  }
  const isolate = settings.isolate ?? (isolates && sourcesOf(data.training).some(({ data }) => data.examples !== null))
  const rows = { sequenceLength, batchSize, isolate, lookahead: model.lookahead }
  const order = new TrainingOrder(data.training, { ...rows, accumulate, seed, rank, world })
  return new DatasetLessons(model, order, { validation: data.validation, precision })
}

/** Norm of each parameter. */
async function normsOf(named: readonly NamedParameter[]): Promise<Record<string, number>> {
  const weights = named.filter(({ parameter }) => parameter.dtype === 'f32')
  if (weights.length === 0) return {}
  using norms = scope(() => noGrad(() => concat(weights.map(({ parameter }) => globalNorm([parameter]).reshape([1])))))
  const values = await norms.values()
  return Object.fromEntries(weights.map(({ name }, i) => [name, values[i]]))
}

const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length

function checkedNumbers(values: Readonly<Record<string, number>>): Readonly<Record<string, number>> {
  for (const [name, value] of Object.entries(values)) {
    if (typeof value === 'number') continue
    throw new MoeError({
      code: 'E_ATTR',
      op: 'log',
      problem: `${name} is ${shown(value)}`,
      fix: 'pass numbers by name: log({ accuracy: 0.5 })',
    })
  }
  return { ...values }
}
