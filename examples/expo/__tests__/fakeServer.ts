/**
 * Darkroom in memory, and a phone to use it from. The server keeps the rules of sql/: idempotency
 * keys, charges and refunds, one retry at a time, pages, when to ask again. The phone's network
 * fails in every way a network can, and its storage outlives the app.
 */
import { type Api, DarkroomError, type Environment, GenerationStore } from '../src/darkroom';
import type { EnqueueAnswer, Entitlement, Job, Model, Params, Status } from '../src/darkroom/types';

export const USER_ID = '01a20068-0000-7000-8000-000000000001';

export const MODEL: Model = {
  id: 'darkroom/preview',
  title: 'Preview',
  price_credits: 1,
  paid_price_credits: 1,
  requires_paid: false,
  paused_until: null,
  max_images: 1,
  inputs: {},
  image_inputs: ['image'],
};
export const DEAR_MODEL: Model = {
  ...MODEL,
  id: 'dear',
  price_credits: 100,
  paid_price_credits: 2,
};
export const PAID_MODEL: Model = { ...MODEL, id: 'paid', requires_paid: true };

const refusal = (status: number, token: string, detail = '') =>
  new DarkroomError(token, status, detail);
const unreachable = () => new DarkroomError('unreachable', 0, 'Network request failed', true);
const clone = <T>(value: T): T => JSON.parse(JSON.stringify(value)) as T;

interface StoredJob extends Job {
  isDeleted: boolean;
}

export class FakeServer {
  jobs: StoredJob[] = []; // oldest first
  models = [MODEL, DEAR_MODEL, PAID_MODEL];
  /** What of the balance ends when. */
  ending: Entitlement['credits_ending'] = [];
  balance = 10;
  plan = 'free';
  maxActive = 100;
  /** What jobs take; null if no job was ever completed. */
  meanSeconds: number | null = null;
  ledger: { job_id: string; kind: 'charge' | 'refund'; amount: number }[] = [];
  /** What the next requests for a picture fail with. */
  refusal: Error | null = null;
  private lastId = 0;

  charges = () => this.ledger.filter(({ kind }) => kind === 'charge').length;
  newest = () => this.jobs.at(-1)!;

  // --- what users call ---

  enqueue(
    model: string,
    prompt: string,
    params: Params,
    key: string | null,
    seen = Infinity,
  ): EnqueueAnswer {
    if (this.refusal) throw this.refusal;
    const known = key && this.jobs.find((job) => job.idempotency_key === key);
    if (known) {
      const isSame = JSON.stringify([model, prompt, params]) ===
        JSON.stringify([known.model, known.prompt, known.params]);
      if (!isSame) throw refusal(409, 'idempotency_conflict');
      return this.answer(known);
    }
    const reusable = this.jobs.find(
      (job) => params.reuse && job.status === 'completed' && job.prompt === prompt,
    );
    if (reusable) return this.answer(reusable, true);
    return this.insert({ model, prompt, params, idempotency_key: key }, seen);
  }

  retry(jobId: string, seen = Infinity): EnqueueAnswer {
    const old = this.require(jobId);
    if (old.finished_at === null) throw refusal(409, 'not_finished');
    if (old.status === 'completed') throw refusal(409, 'already_finished');
    const known = this.jobs.find(
      (job) => job.retry_of === jobId && !['failed', 'canceled'].includes(job.status),
    );
    if (known) return this.answer(known);
    const { model, prompt, params } = old;
    return this.insert({ model, prompt, params, retry_of: jobId }, seen);
  }

  cancel(jobId: string): Job {
    const job = this.require(jobId);
    if (job.status === 'completed' || job.status === 'failed') {
      throw refusal(409, 'already_finished', `the job is ${job.status}`);
    }
    if (job.status === 'queued') this.end(job, 'canceled', job.price_credits);
    if (job.status === 'processing') job.cancel_requested = true;
    return this.show(job);
  }

  page(before: string | null) {
    const all = this.jobs.filter((job) => !job.isDeleted && (!before || job.job_id < before));
    const generations = all.reverse().slice(0, 20).map((job) => this.show(job));
    const isLast = all.length === generations.length;
    return { generations, next_before: isLast ? null : generations.at(-1)!.job_id };
  }

  activeJobs(ids: readonly string[]): Job[] {
    if (ids.length > 100) throw refusal(400, 'invalid_input', 'job_ids: more than 100');
    const isTold = (job: StoredJob) => job.finished_at === null || ids.includes(job.job_id);
    const told = this.jobs.filter((job) => !job.isDeleted && isTold(job));
    return told.reverse().map((job) => this.show(job));
  }

  entitlement() {
    return {
      user_id: USER_ID,
      plan: this.plan,
      paid_until: null,
      credits: this.balance,
      debt: 0,
      credits_ending: this.ending,
      blocked_until: null,
      is_busy: false,
      active_jobs: this.active().length,
      max_active: this.maxActive,
      minute_jobs: 0,
      max_per_minute: 100,
      max_batch: 3,
    };
  }

  call(...[name, args]: Parameters<Api['call']>): unknown {
    const { job_id, ...news } = args as { job_id: string; [name: string]: unknown };
    if (this.refusal) throw this.refusal;
    if (name === 'restore_generation') {
      this.jobs.find((j) => j.job_id === job_id)!.isDeleted = false;
    }
    const job = this.require(job_id);
    if (name === 'set_favorite') Object.assign(job, news);
    if (name === 'delete_generation') {
      job.isDeleted = true;
      for (const image of job.images) image.is_public = false;
    }
    if (name === 'share_image') {
      job.images[news.image_position as number]!.is_public = news.is_public as boolean;
    }
    return name === 'restore_generation' ? this.show(job) : { job_id };
  }

  // --- what happens to jobs ---

  begin(job = this.newest()): void {
    Object.assign(job, { status: 'processing', stage: 'generating', started_at: now() });
  }

  complete(job = this.newest()): void {
    const path = `${USER_ID}/${job.job_id}/0.png`;
    const image = {
      position: 0,
      path,
      preview_path: null,
      content_type: 'image/png',
      width: 1024,
      height: 1024,
      bytes: 1,
      blurhash: 'LEHV6nWB2yk8pyo0adR*.7kCMdnj',
      is_public: false,
    };
    this.end(job, 'completed', 0, { images: [image] });
  }

  fail(job = this.newest(), code = 'provider_error'): void {
    this.end(job, 'failed', job.price_credits, { error: { code, message: 'It did not work.' } });
  }

  stopCanceled(job = this.newest()): void {
    this.end(job, 'canceled', job.price_credits);
  }

  delete(job = this.newest()): void {
    job.isDeleted = true;
  }

  /** As many jobs from another device, completed. */
  addHistory(count: number): void {
    for (let i = 0; i < count; i += 1) {
      this.balance += 1;
      this.enqueue(MODEL.id, `older ${i}`, {}, null);
      this.complete();
    }
  }

  private active = () => this.jobs.filter((job) => job.finished_at === null);

  private require(jobId: string): StoredJob {
    const job = this.jobs.find(({ job_id, isDeleted }) => job_id === jobId && !isDeleted);
    if (!job) throw refusal(404, 'not_found');
    return job;
  }

  private insert(asked: Partial<Job> & { model: string }, seen: number): EnqueueAnswer {
    const model = this.models.find(({ id }) => id === asked.model);
    if (!model) throw refusal(404, 'not_found');
    if (model.requires_paid && this.plan !== 'paid') throw refusal(403, 'requires_paid_plan');
    if (this.active().length >= this.maxActive) throw refusal(429, 'too_many_active');
    const price = this.plan === 'paid' ? model.paid_price_credits : model.price_credits;
    if (price > seen) {
      throw refusal(
        409,
        'price_changed',
        `the price is ${price}, seen was ${seen}. Read it again.`,
      );
    }
    if (price > this.balance) {
      throw refusal(402, 'insufficient_credits', `need ${price}, have ${this.balance}`);
    }
    const job: StoredJob = {
      job_id: this.newId(),
      status: 'queued',
      stage: null,
      progress: null,
      attempt: 0,
      cancel_requested: false,
      queue_position: null,
      eta_seconds: null,
      poll_after_ms: null,
      alias: null,
      batch_id: null,
      retry_of: null,
      idempotency_key: null,
      prompt: '',
      params: {},
      price_credits: price,
      refunded_credits: 0,
      error: null,
      images: [],
      is_favorite: false,
      tags: [],
      created_at: now(),
      started_at: null,
      finished_at: null,
      isDeleted: false,
      ...asked,
    };
    this.jobs.push(job);
    this.move(job, 'charge', -price);
    return this.answer(job);
  }

  private end(job: StoredJob, status: Status, refund: number, more: Partial<Job> = {}): void {
    if (job.finished_at !== null) return;
    Object.assign(job, more, { status, stage: null, finished_at: now(), refunded_credits: refund });
    if (refund) this.move(job, 'refund', refund);
  }

  private move({ job_id }: Job, kind: 'charge' | 'refund', amount: number): void {
    this.balance += amount;
    this.ledger.push({ job_id, kind, amount });
  }

  private newId(): string {
    this.lastId += 1;
    return `01a20068-0000-7000-8000-${this.lastId.toString(16).padStart(12, '0')}`;
  }

  private answer(job: StoredJob, reused = false): EnqueueAnswer {
    const { job_id, status, queue_position, eta_seconds, poll_after_ms } = this.show(job);
    const known = { job_id, status, queue_position, eta_seconds, poll_after_ms };
    return { ...known, reused, credits_left: this.balance, size: null };
  }

  private show({ isDeleted, ...job }: StoredJob): Job {
    return clone({ ...job, poll_after_ms: this.pollAfter(job) });
  }

  /** As private.poll_after_ms in sql/48_eta.sql. */
  pollAfter(job: Job): number | null {
    if (job.finished_at !== null) return null;
    const age = (Date.now() - Date.parse(job.created_at)) / 1000;
    const due = this.meanSeconds === null ? null : this.meanSeconds - age;
    const wait = due === null ? age * 500 : Math.max(due * 400, (age * 1000) / 30);
    return Math.round(Math.min(10_000, Math.max(1_000, wait)));
  }
}

const now = () => new Date().toISOString();

/** A promise and how to keep it. */
function gate() {
  let open = () => {};
  const passed = new Promise<void>((resolve) => (open = resolve));
  return { passed, open };
}

type Call = keyof Api;

export class FakePhone {
  readonly files = new Map([['file:///cat.jpg', 'a cat']]);
  readonly uploads: string[] = [];
  /** What was asked, by function. */
  readonly requests: Partial<Record<Call, number>> = {};
  requestsWhileHidden = 0;
  /** What was stored on the device when it was asked last, by function. */
  readonly heldAtRequest: Partial<Record<Call, string[]>> = {};
  /** `lossy`: what is asked is done, but no answer arrives. */
  network: 'on' | 'off' | 'lossy' = 'on';
  /** How long a request travels, and its answer. */
  latency = 0;
  readonly stored = new Map<string, string>();
  storageLatency = 0;
  isStorageBroken = false;
  store!: GenerationStore;

  private readonly held = new Map<Call, ReturnType<typeof gate>>();
  private readonly heldOnce = new Map<Call, Promise<void>>();
  private cut = gate();
  private lastKey = 0;
  private app = { isVisible: true, isDead: true, wakes: new Set<() => void>() };
  private readonly listeners = new Set<() => void>();

  constructor(readonly server: FakeServer) {}

  // --- the app ---

  /** Starts the app, with a new store. */
  open(): GenerationStore {
    this.app = { isVisible: true, isDead: false, wakes: new Set() };
    this.store = this.newStore();
    this.store.start();
    return this.store;
  }

  /** The system ends the app without a word. */
  kill(): void {
    this.app.isDead = true;
    this.app.isVisible = false;
    this.listeners.clear();
  }

  hide(): void {
    this.app.isVisible = false;
    this.app.wakes.forEach((wake) => wake());
  }

  show(): void {
    this.app.isVisible = true;
    this.app.wakes.forEach((wake) => wake());
  }

  /** Another tab or window of the same app. */
  newStore(): GenerationStore {
    return new GenerationStore(this.api(), this.environment(), USER_ID, (hint) => {
      this.listeners.add(hint);
      return () => void this.listeners.delete(hint);
    });
  }

  hint(): void {
    this.listeners.forEach((hint) => hint());
  }

  listening = () => this.listeners.size;
  watching = () => this.app.wakes.size;

  // --- the network ---

  goOff(): void {
    this.network = 'off';
    this.cut.open();
    this.cut = gate();
  }

  goOn(isTold = false): void {
    this.network = 'on';
    if (isTold) this.app.wakes.forEach((wake) => wake());
  }

  /** Answers of this function are held back from now on. */
  hold(call: Call): void {
    this.held.set(call, gate());
  }

  /** Only the next answer of this function is held back; answers how to release it. */
  holdNext(call: Call): () => void {
    const { passed, open } = gate();
    this.heldOnce.set(call, passed);
    return open;
  }

  release(call: Call): void {
    this.held.get(call)?.open();
    this.held.delete(call);
  }

  count = (...calls: Call[]) =>
    (calls.length ? calls : (Object.keys(this.requests) as Call[])).reduce(
      (sum, call) => sum + (this.requests[call] ?? 0),
      0,
    );

  forgetRequests(): void {
    for (const call of Object.keys(this.requests) as Call[]) delete this.requests[call];
  }

  // --- what the store is given ---

  private api(): Api {
    const { server, app } = this;
    const call = <T>(name: Call, run: () => T) => this.request(app, name, run);
    return {
      ping: () => call('ping', () => ({ ok: true, server_time: now() })),
      models: () => call('models', () => server.models),
      entitlement: () => call('entitlement', () => server.entitlement()),
      page: (before) => call('page', () => server.page(before)),
      activeJobs: (ids) => call('activeJobs', () => server.activeJobs(ids)),
      enqueue: ({ model, prompt, params, idempotency_key, max_price_credits: seen }) =>
        call('enqueue', () => {
          return server.enqueue(model, prompt, params as Params, idempotency_key, seen);
        }),
      retry: (...args) => call('retry', () => server.retry(...args)),
      cancel: (id) => call('cancel', () => server.cancel(id)),
      call: <T>(...asked: Parameters<Api['call']>) =>
        call('call', () => server.call(...asked) as T),
      uploadSource: async (path, { uri }) => {
        if (!this.files.has(uri)) throw refusal(0, 'source_lost', 'It is no longer here.');
        await call('uploadSource', () => void this.uploads.push(path));
      },
    };
  }

  private async request<T>(app: typeof this.app, name: Call, run: () => T): Promise<T> {
    if (app.isDead) return new Promise(() => {});
    this.requests[name] = (this.requests[name] ?? 0) + 1;
    if (!app.isVisible) this.requestsWhileHidden += 1;
    this.heldAtRequest[name] = [...this.stored.keys()].filter((key) => key.includes('outbox'));
    const { cut, held, heldOnce } = this;
    const once = heldOnce.get(name);
    heldOnce.delete(name);
    await this.travel();
    if (this.network === 'off') throw unreachable();
    const outcome = attempt(run);
    if (this.network === 'lossy') throw unreachable();
    const answer = Promise.resolve(once ?? held.get(name)?.passed).then(() => this.travel());
    const isCut = await Promise.race([answer.then(() => false), cut.passed.then(() => true)]);
    if (app.isDead) return new Promise(() => {});
    if (isCut) throw unreachable();
    return outcome();
  }

  private async travel(): Promise<void> {
    if (this.latency) await new Promise((resolve) => setTimeout(resolve, this.latency));
  }

  private environment(): Environment {
    const { app, stored } = this;
    const access = async <T>(run: () => T): Promise<T> => {
      if (app.isDead) return new Promise(() => {});
      const wait = this.storageLatency;
      if (wait) await new Promise((resolve) => setTimeout(resolve, wait));
      if (this.isStorageBroken) throw new Error('storage is full');
      return run();
    };
    return {
      storage: {
        // AsyncStorage takes a callback as the last argument: nothing else may come there.
        getItem: (name, ...more: unknown[]) =>
          access(() => (expectNone(more), stored.get(name) ?? null)),
        setItem: (name, value, ...more: unknown[]) =>
          access(() => (expectNone(more), void stored.set(name, value))),
        removeItem: (name, ...more: unknown[]) =>
          access(() => (expectNone(more), void stored.delete(name))),
        getAllKeys: () => access(() => [...stored.keys()]),
      },
      // Later keys do not sort after earlier ones.
      newKey: () => `key-${((this.lastKey += 1) * 7919) % 10007}`,
      isVisible: () => app.isVisible,
      onChange: (callBack) => {
        app.wakes.add(callBack);
        return () => void app.wakes.delete(callBack);
      },
    };
  }
}

function expectNone(more: unknown[]): void {
  if (more.length) throw new Error(`unexpected arguments: ${String(more)}`);
}

/** Does it now; tells how it went later. */
function attempt<T>(run: () => T): () => T {
  try {
    const answer = run();
    return () => answer;
  } catch (error) {
    return () => {
      throw error;
    };
  }
}
