/** @file One call of `train`: the loop over its steps, with checkpoints, evaluations, events and the result. */
import { type NamedParameter, namedStreams, parameterCount, yieldToEventLoop } from '@moe/core'
import type { BatchSource } from './batch-source.ts'
import { runFolder } from './checkpoints/locate-run.ts'
import { OptimizerOnRanks } from './checkpoints/optimizer-on-ranks.ts'
import type { RunFolder } from './checkpoints/run-folder.ts'
import { loadTraining, saveTraining } from './checkpoints/save-load.ts'
import { startingPoint } from './checkpoints/starting-point.ts'
import type { RunRecord, TrainerState } from './checkpoints/trainer-state.ts'
import { WeightsOnRanks } from './checkpoints/weights-on-ranks.ts'
import type { TokenData } from './data/token-data.ts'
import { Emitter } from './emitter.ts'
import type { Evaluation } from './evaluate.ts'
import type { EvaluationEvent, StepEvent, TrainEvent } from './events.ts'
import { peakResidentBytes } from './host.ts'
import type { Interrupts } from './interrupt.ts'
import { makeBatchSource } from './make-batch-source.ts'
import type { TrainableModel } from './model.ts'
import type { ModelEma } from './model-ema.ts'
import { StepsOnRanks } from './model-on-ranks.ts'
import { NextBatches } from './next-batches.ts'
import { checkFiniteModel } from './non-finite.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { scheduled } from './optim/schedule.ts'
import { evaluationLimit, type ResolvedOptions, recordRun } from './options.ts'
import { RankGroup } from './rank-group.ts'
import { useRankStreams } from './rank-streams.ts'
import { gatherNumbers, type Ranks } from './ranks.ts'
import { LoadSums } from './report/loads-log.ts'
import { metricsLine } from './report/metrics-log.ts'
import { progress } from './report/progress.ts'
import { RecentMetrics } from './report/recent-metrics.ts'
import type { TrainResult } from './result.ts'
import type { Preferences } from './rewards/preferences.ts'
import type { Rollouts } from './rewards/rollouts.ts'
import { checkSameInitialState, checkSameSettings } from './same-on-ranks.ts'
import type { ShardedUpdate } from './sharded-update.ts'
import { startNotices } from './start-notices.ts'
import type { Steps } from './step-numbers.ts'
import { TrainingSteps } from './training-steps.ts'

const noEvaluation: Evaluation = { loss: Number.NaN, bitsPerByte: Number.NaN, tokens: 0, seconds: 0 }

/** An evaluation of the weights and, if they are averaged, of the EMA. */
type RunEvaluation = Evaluation & Pick<EvaluationEvent, 'ema'>

type Peaks = Pick<TrainResult, 'peakMemoryBytes' | 'peakDeviceBytes'>

/** One call of `train`. */
export class Run {
  readonly model: TrainableModel
  readonly settings: ResolvedOptions
  readonly source: BatchSource
  readonly parameters: readonly NamedParameter[]
  readonly optimizer: Optimizer
  readonly ema: ModelEma | undefined
  /** If each rank updates its share of the parameters. */
  readonly sharded: ShardedUpdate | undefined
  readonly steps: Steps
  readonly interrupts: Interrupts
  readonly record: RunRecord
  readonly events: Emitter
  readonly folder: RunFolder | undefined
  /** The folder, on the rank that writes to it. */
  readonly writableFolder: RunFolder | undefined
  /** Assembles the optimizer state for checkpoints, if ranks have parts of it. */
  optimizerOnRanks: OptimizerOnRanks | undefined
  /** Assembles the weights for checkpoints, if ranks have parts of the model. */
  weightsOnRanks: WeightsOnRanks | undefined
  /** Whether checkpoints are saved, by this rank or by another one. */
  savesCheckpoints: boolean
  /** Loads since the last `loads` event. */
  readonly loads = new LoadSums()
  /** Metrics of the last tenth of the steps done, for the result. */
  readonly recent = new RecentMetrics()
  readonly next: NextBatches
  /** Steps done. */
  step = 0
  tokens = 0
  trainSeconds = 0
  /** Peaks of earlier processes of the run. */
  earlierPeaks: Peaks = { peakMemoryBytes: 0, peakDeviceBytes: 0 }
  savedStep = -1
  checkpoint: string | undefined
  unlock = () => {}
  restoreStreams = () => {}

  constructor(
    model: TrainableModel,
    settings: ResolvedOptions,
    data: TokenData | Rollouts | Preferences,
    parameters: readonly NamedParameter[],
    { optimizer, sharded }: { readonly optimizer: Optimizer; readonly sharded?: ShardedUpdate },
    ema: ModelEma | undefined,
    interrupts: Interrupts,
  ) {
    this.model = model
    this.settings = settings
    this.parameters = parameters
    this.optimizer = optimizer
    this.ema = ema
    this.sharded = sharded
    const { clip, precision, record, ranks, onRanks, rank } = settings
    this.steps =
      onRanks === undefined
        ? new TrainingSteps(model, parameters, optimizer, { clip, precision, record, ranks, shard: sharded?.shard })
        : new StepsOnRanks(model, onRanks, optimizer, { clip, precision })
    this.interrupts = interrupts
    const group = new RankGroup({ ranks, like: parameters[0].parameter, save: () => this.saveAfterFailure() })
    this.source = makeBatchSource(model, settings, data, group, interrupts.signal)
    this.next = new NextBatches(this.source, group, interrupts.signal)
    this.record = recordRun(settings, this.source, model, parameters, optimizer)
    this.folder = settings.out === undefined ? undefined : runFolder(settings.out)
    this.writableFolder = (ranks?.rank ?? rank) === 0 ? this.folder : undefined
    this.savesCheckpoints = this.writableFolder !== undefined
    const draw = settings.progress ?? (ranks === undefined || ranks.rank === 0)
    const listeners = [
      ...(draw === false ? [] : [draw === true ? progress() : draw]),
      ...(this.writableFolder?.listeners ?? []),
      ...(settings.onEvent === undefined ? [] : [settings.onEvent]),
    ]
    this.events = new Emitter(listeners, () => this.step)
  }

  get log() {
    return this.writableFolder?.log
  }

  get backend() {
    return this.parameters[0].parameter.backend
  }

  get peaks(): Peaks {
    const { peakMemoryBytes, peakDeviceBytes } = this.earlierPeaks
    return {
      peakMemoryBytes: Math.max(peakMemoryBytes, peakResidentBytes()),
      peakDeviceBytes: Math.max(peakDeviceBytes, this.backend.stats().peakBytes),
    }
  }

  /** Number of ranks that train together. */
  get size(): number {
    return this.settings.ranks === undefined ? 1 : this.settings.world
  }

  /** Positions of the whole run; 0 if that is not known in advance. */
  get totalTokens(): number {
    const { source, settings, step, size } = this
    const all = source.tokensInSteps(settings.steps)
    // The steps done so far may have had other batch sizes.
    return all === 0 ? 0 : this.tokens + (all - source.tokensInSteps(step)) * size
  }

  /** Trains to the last step, or until the run is stopped. */
  async execute(): Promise<TrainResult> {
    const { settings, source } = this
    const { ranks, onRanks } = settings
    if (ranks !== undefined) await this.checkSettingsAgree(ranks)
    const parts = onRanks ?? (this.sharded && { ranks: this.sharded.ranks, parameters: this.sharded.shard.parameters })
    if (parts !== undefined) this.optimizerOnRanks = await OptimizerOnRanks.of(parts, this.optimizer, this.backend)
    if (onRanks !== undefined) this.weightsOnRanks = await WeightsOnRanks.of(onRanks, this.model)
    await this.prepareFolder()
    await onRanks?.synchronize()
    if (ranks !== undefined) {
      const own = { step: this.step, saves: this.savesCheckpoints }
      this.savesCheckpoints = (await checkSameInitialState(ranks, this.parameters, own)).saves
    }
    this.emitStart()
    await this.events.settled()
    if (ranks !== undefined && onRanks === undefined) this.restoreStreams = useRankStreams(ranks, this.model)
    const limit = this.trainSeconds + (settings.timeLimitSeconds ?? Number.POSITIVE_INFINITY)
    let stop = await this.reasonToStop(limit)
    while (this.step < settings.steps && stop === null) {
      if (!(await this.takeStep())) {
        stop = 'interrupted'
        break
      }
      if (this.step === settings.steps) break
      if (this.step % source.stride > 0) continue
      // With a stride, the first multiple of it that is not before the due step.
      const isDue = (every: number) => every > 0 && this.step % every < source.stride
      if (isDue(settings.checkpointEvery)) await this.save()
      if (isDue(settings.evalEvery)) await this.evaluate({ final: false })
      stop = await this.reasonToStop(limit)
    }
    await this.save()
    if (stop !== null && this.step < settings.steps) return this.stopped(stop)
    const validation = await this.evaluate({ final: true })
    if (validation === null) return this.stopped('interrupted')
    return this.finish('finished', validation)
  }

  /** Reports the error that ended the run, and writes what is still buffered. */
  async fail(error: unknown): Promise<void> {
    try {
      this.log?.flush()
      await this.emitLoads({ biases: false })
      this.events.emit({ type: 'fail', error })
      await this.events.settled()
    } catch {
      // The caller throws the first error.
    }
  }

  dispose(): void {
    this.steps.dispose()
    this.source.dispose()
    this.restoreStreams()
    this.unlock()
  }

  /**
   * Why no further step is taken; the same on all ranks. If the data of the next step cannot be read on one of several
   * ranks, all save the steps done so far and fail.
   */
  async reasonToStop(limit: number): Promise<'interrupted' | 'time' | null> {
    const { ranks, steps } = this.settings
    const readable = ranks === undefined || this.step === steps || this.next.readAhead(this.step)
    const own = [this.interrupts.signal.aborted, this.trainSeconds >= limit, !readable].map(Number)
    const all = ranks === undefined ? [own] : await gatherNumbers(ranks, own, this.parameters[0].parameter)
    const [interrupted, late, unreadable] = own.map((_, i) => all.some(flags => flags[i] === 1))
    if (interrupted) return 'interrupted'
    if (late) return 'time'
    if (unreadable) await this.next.readTogether(this.step)
    return null
  }

  /** @throws MoeError E_CONFIG if ranks have different options, data or models */
  async checkSettingsAgree(ranks: Ranks): Promise<void> {
    const { checkpointEvery, evalEvery } = this.settings
    // JSON has no Infinity.
    const evalTokens = `${this.settings.evalTokens}`
    const heldOutTokens = this.source.validationTokens
    // The optimizer's settings depend on the parameters, so those are compared first.
    const { parameters } = this.record
    const own = { parameters, ...this.record, checkpointEvery, evalEvery, evalTokens, heldOutTokens }
    await checkSameSettings(ranks, own, this.parameters[0].parameter)
  }

  /** Locks and clears the run's folder, or restores the checkpoint to resume from. */
  async prepareFolder(): Promise<void> {
    const { folder, writableFolder } = this
    if (folder === undefined) return
    let from = await startingPoint(folder, this.settings)
    if (writableFolder !== undefined) {
      this.unlock = writableFolder.lock()
      // Another training may have saved and ended in between.
      from = await startingPoint(folder, this.settings)
    }
    if (from === undefined) {
      await writableFolder?.clear()
      return
    }
    const state = await loadTraining(
      folder,
      from,
      this.checkpointParts,
      this.settings.allowChanges ? null : this.record,
    )
    this.step = state.step
    this.continueData(state)
    if (this.model.step !== undefined) this.model.step = state.modelStep ?? state.step
    this.tokens = state.tokens
    this.trainSeconds = state.trainSeconds
    this.earlierPeaks = state
    this.savedStep = state.step
    this.checkpoint = from.path
    this.recent.addBalanceNames(state.balance ?? [])
    for (const { name, random } of namedStreams(this.model)) Object.assign(random, state.streams?.[name])
    await writableFolder?.truncateLogs(state.step, line => this.recent.add(line))
  }

  /** Takes up the data where the checkpoint left it. Other data, and rows of another length, start at their beginning. */
  continueData({ step, rows, run }: TrainerState): void {
    const { data, sequenceLength, isolate } = this.record
    const { items } = this.source
    const isSame =
      items === undefined
        ? run['data'] === data && run['sequenceLength'] === sequenceLength && run['isolate'] === isolate
        : `${run['data']}`.startsWith(items)
    // Checkpoints of earlier versions have no rows.
    if (rows !== undefined) this.source.continueFrom(step, isSame ? rows : 0)
  }

  /** @returns false if it was interrupted before the step began */
  async takeStep(): Promise<boolean> {
    const { settings, source } = this
    const started = performance.now()
    const lr = settings.lr * scheduled(settings.schedule, this.step)
    const batches = await this.next.take(this.step)
    if (batches === null) return false
    const done = this.steps.step(batches, { lr, step: this.step + 1 })
    // A failure of the step is thrown by the `await` below, after the next batches were prefetched.
    done.catch(() => undefined)
    if (this.step + 1 < settings.steps) {
      // If it fails, it is tried again when it is their turn.
      this.next.readAhead(this.step + 1)
      if (this.next.ready) this.steps.prepare(this.next.ready)
    }
    const numbers = await done
    this.ema?.update()
    // Yields to the event loop, so that Ctrl-C is seen even if no download waits.
    await yieldToEventLoop()
    const seconds = (performance.now() - started) / 1000
    const tokens = source.tokensInStep(this.step) * this.size
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
      metrics: { ...source.metrics, ...numbers.metrics, ...numbers.after },
    }
    this.recent.addBalanceNames(Object.keys(numbers.after))
    const line = metricsLine(event)
    this.log?.line(line)
    this.recent.add(line)
    this.events.emit(event)
    const { loadsEvery } = settings
    if (loadsEvery > 0) this.loads.add(this.model.layerLoads)
    if (this.step % loadsEvery === 0) await this.emitLoads()
    await this.events.settled()
    return true
  }

  /** Emits the loads since the last `loads` event. */
  async emitLoads(options = { biases: true }): Promise<void> {
    const event = await this.loads.take(this.step, options)
    if (event !== null) this.events.emit(event)
  }

  /** @returns null if it was interrupted */
  async evaluate({ final }: { readonly final: boolean }): Promise<RunEvaluation | null> {
    const { source, interrupts } = this
    const limit = evaluationLimit(this.settings, { final })
    if (source.validationTokens === 0) return noEvaluation
    this.log?.flush()
    const { signal } = interrupts
    const parts = this.ema === undefined ? 1 : 2
    const evaluatePart = (part: number) => {
      const onProgress = (done: number) =>
        this.events.emit({ type: 'evaluating', step: this.step, done: (part + done) / parts })
      return source.evaluate({ limit, signal, onProgress })
    }
    const ofWeights = await evaluatePart(0)
    if (ofWeights === null) return null
    const ofEma = await this.ema?.withAverages(() => evaluatePart(1))
    if (ofEma === null) return null
    const evaluation = { ...ofWeights, ...(ofEma && { ema: ofEma }) }
    this.events.emit({ type: 'evaluation', step: this.step, final, ...evaluation })
    await this.events.settled()
    return evaluation
  }

  async save(): Promise<void> {
    const { settings, step, tokens, trainSeconds, writableFolder } = this
    // A resumed run truncates `loads.jsonl` to its checkpoint, so the line up to there must exist.
    await this.emitLoads()
    if (!this.savesCheckpoints || this.savedStep === step) return
    const started = performance.now()
    this.log?.flush()
    await settings.onRanks?.synchronize()
    const { onRanks } = settings
    await checkFiniteModel(onRanks?.weights ?? this.parameters, step, {
      ranks: onRanks?.ranks,
      like: this.parameters[0].parameter,
    })
    this.savedStep = step
    if (writableFolder === undefined) {
      await this.weightsOnRanks?.send()
      await this.ema?.withAverages(async () => this.weightsOnRanks?.send())
      await this.optimizerOnRanks?.send()
      return
    }
    const balance = this.recent.balanceNames
    const streams = Object.fromEntries(namedStreams(this.model).map(({ name, random }) => [name, { ...random }]))
    const ofModel = { modelStep: this.model.step, balance, streams }
    const averagedSteps = this.ema?.steps
    const rows = this.source.rowsIn(step)
    const state = { step, rows, tokens, trainSeconds, ...this.peaks, ...ofModel, averagedSteps, run: this.record }
    const { path } = await saveTraining(writableFolder, this.checkpointParts, state, settings.keepCheckpoints)
    this.checkpoint = path
    this.events.emit({ type: 'checkpoint', step, path, seconds: (performance.now() - started) / 1000 })
    await this.events.settled()
  }

  /** Not while the model contains the EMA, which would be saved as its weights. */
  async saveAfterFailure(): Promise<void> {
    if (this.ema?.isInModel !== true) await this.save()
  }

  get checkpointParts() {
    const { data, tokenizer, bos, eos } = this.settings
    const template = 'template' in data ? data.template : undefined
    const optimizer = this.optimizerOnRanks ?? this.optimizer
    const whole = this.weightsOnRanks
    const weights = this.settings.onRanks?.weights
    return {
      model: this.model,
      weights,
      whole,
      optimizer,
      ema: this.ema,
      tokenizer,
      template,
      documentIds: { bos, eos },
    }
  }

  async stopped(reason: 'interrupted' | 'time'): Promise<TrainResult> {
    const { step, checkpoint } = this
    this.events.emit({ type: 'stop', reason, step, steps: this.settings.steps, checkpoint })
    return this.finish(reason, noEvaluation)
  }

  async finish(stopped: TrainResult['stopped'], { ema, ...validation }: RunEvaluation): Promise<TrainResult> {
    const { settings, backend, recent } = this
    await settings.onRanks?.synchronize()
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
      trainingLoss: recent.trainingLoss,
      validation,
      ...(ema && { ema }),
      balance: recent.balance,
      ...this.peaks,
      checkpoint: this.checkpoint,
    }
    await this.log?.close()
    await this.writableFolder?.writeSummary(result)
    this.events.emit({ type: 'end', result })
    await this.events.settled()
    return result
  }

  /** What the first `steps` steps take from each source of a mixture. */
  sources(steps: number): Pick<TrainResult, 'sources'> {
    const sources = this.source.sources?.(steps) ?? []
    if (sources.length === 0) return {}
    const entries = sources.map(({ name, data, share, windows, epochs }) => {
      return [name, { size: data.length, share, tokens: windows * this.settings.sequenceLength, epochs }]
    })
    return { sources: Object.fromEntries(entries) }
  }

  emitStart(): void {
    const { settings, source, backend } = this
    const steps = Math.max(settings.steps, this.step)
    const start: TrainEvent = {
      type: 'start',
      backend: backend.name,
      device: backend.device,
      precision: settings.precision,
      parameters: parameterCount(this.model),
      steps: settings.steps,
      fromStep: this.step,
      fromTokens: this.tokens,
      tokensPerStep: source.tokensInStep(this.step) * this.size,
      tokens: this.totalTokens,
      ...(source.textsPerStep > 0 && { textsPerStep: source.textsPerStep }),
      trainingTokens: source.trainingTokens,
      validationTokens: source.validationTokens,
      epochs: source.epochs(steps),
      ...this.sources(steps),
      out: this.folder?.path,
      rank: settings.rank,
      settings: this.record,
    }
    this.events.emit(start)
    const { validationTokens } = source
    const { savesCheckpoints } = this
    const own = startNotices(this.model, this.parameters, { settings, validationTokens, savesCheckpoints })
    const notices = [...own, ...source.notices]
    for (const message of notices) this.events.emit({ type: 'notice', message })
  }
}
