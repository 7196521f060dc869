/**
 * The user's generations as an app shows them, without a framework.
 *
 * State comes from reads only; answers and hints are reasons to read. A request is on the list before
 * it is sent, and on the device until it is answered: it is repeated with its key however often its
 * answer is lost, so it is done and charged once.
 */
import { DarkroomError, type Api } from './api';
import type { EnqueueAnswer, Entitlement, Job, Model, Page, Params } from './types';

/** What the device gives; `storage` is AsyncStorage, or made like it. */
export interface Environment {
  storage: {
    getItem(key: string): Promise<string | null>;
    setItem(key: string, value: string): Promise<void>;
    removeItem(key: string): Promise<void>;
    getAllKeys(): Promise<readonly string[]>;
  };
  /** A new unique id, at most 255 characters. */
  newKey(): string;
  isVisible(): boolean;
  /** Calls back when the app was shown or hidden or the network is back; answers how to stop. */
  onChange(callBack: () => void): () => void;
}

/** A picture on the device, and the model's input that takes it, alone or in a list. */
export interface Source {
  uri: string;
  contentType: string;
  input: string;
  isList: boolean;
}

export interface Generation {
  /** Stays when the placeholder becomes the job: the key of its card. */
  key: string;
  /** Sending, waiting for the network, or refused; null once the server has it. */
  local: 'sending' | 'waiting' | 'refused' | null;
  /** As read last; of a placeholder what is known of it, with an empty `job_id`. */
  job: Job;
  source: Source | null;
}

export type Snapshot = ReturnType<GenerationStore['getSnapshot']>;
type Timer = ReturnType<typeof setTimeout>;

/** The same wish again within this time, or before it was answered, is a double press. */
const SAME_PRESS_MS = 1_000;
const SAVE_AFTER_MS = 300;
const KEPT_GENERATIONS = 40;

const backoff = (failures: number) => Math.min(30_000, 1_000 * 2 ** (failures - 1));
const isFinished = (job: Job) => job.job_id !== '' && job.poll_after_ms === null;
const isUnsent = ({ local }: Generation) => local === 'sending' || local === 'waiting';
const isActive = ({ local, job }: Generation) => !local && !isFinished(job);
/** Is a retry of that job, under way or done. */
const isRetry = ({ local, job }: Generation, of: string | null) =>
  !!of && job.retry_of === of && local !== 'refused' && !['failed', 'canceled'].includes(job.status);

/** A job of which the server has not told yet. */
const draft = (known: Partial<Job>): Job => ({
  job_id: '', status: 'queued', stage: null, progress: null, attempt: null, queue_position: null,
  eta_seconds: null, poll_after_ms: null, cancel_requested: false, model: '', alias: null,
  batch_id: null, retry_of: null, idempotency_key: null, prompt: '', params: {}, price_credits: 0,
  refunded_credits: 0, error: null, images: [], is_favorite: false, tags: [], started_at: null,
  finished_at: null, created_at: new Date().toISOString(), ...known,
});

function throwUnlessDarkroom(error: unknown): asserts error is DarkroomError {
  if (!(error instanceof DarkroomError)) throw error;
}

export class GenerationStore {
  private generations: readonly Generation[] = [];
  private models: readonly Model[] = [];
  private entitlement: Entitlement | null = null;
  private nextBefore: string | null | undefined; // undefined before the first page
  private failures = 0; // requests without an answer, in a row
  private snapshot = this.look();
  private readonly subscribers = new Set<() => void>();

  private isRunning = false;
  private stopWatching = () => {};
  private stopListening = () => {};
  private saveTimer: Timer | undefined;

  private isReading = false;
  private isReadAgain = false;
  private isPageStale = true;
  private isEntitlementStale = true;
  private readTimer: Timer | undefined;

  private isSending = false;
  private sendTimer: Timer | undefined;
  private charges = 0;
  private press = { wish: '', key: '', at: 0 };

  /** `listen` takes what to call with hints, and answers how to stop: see realtime.ts. */
  constructor(
    private readonly api: Api,
    private readonly environment: Environment,
    private readonly userId: string,
    private readonly listen: (hint: (jobId?: string) => void) => () => void = () => () => {},
  ) {}

  subscribe = (subscriber: () => void) => {
    this.subscribers.add(subscriber);
    return () => void this.subscribers.delete(subscriber);
  };

  getSnapshot = () => this.snapshot;

  /** Shows what is on the device, then what the server tells. */
  start = (): void => {
    this.isRunning = true;
    this.stopWatching = this.environment.onChange(this.wake);
    void this.load().then(this.wake);
  };

  stop = (): void => {
    this.isRunning = false;
    this.stopWatching();
    this.wake();
  };

  /** Puts a placeholder on the list and sends the request; answers the key of its card. */
  generate = (model: Model, prompt: string, params: Params, source: Source | null = null) => {
    const wish = JSON.stringify([model.id, prompt, params, source?.uri]);
    const last = this.press.wish === wish && this.find(this.press.key);
    if (last && (isUnsent(last) || Date.now() - this.press.at < SAME_PRESS_MS)) return last.key;
    const key = this.environment.newKey();
    this.press = { wish, key, at: Date.now() };
    const path = this.sourcePath(key);
    const paths = source && { [source.input]: source.isList ? [path] : path };
    const isPaid = this.entitlement?.plan === 'paid';
    const price_credits = isPaid ? model.paid_price_credits : model.price_credits;
    const job = { model: model.id, prompt, params: { ...params, ...paths }, price_credits };
    this.add({ key, local: 'sending', job: draft(job), source });
    return key;
  };

  /** Sends what was refused again; asks anew for what failed or was canceled. */
  retry = (key: string): void => {
    const known = this.find(key);
    if (known?.local === 'refused') {
      this.change(key, { error: null }, 'sending');
      void this.send();
    } else if (known && !this.generations.some((g) => isRetry(g, known.job.job_id))) {
      const { job_id: retry_of, model, prompt, params, price_credits } = known.job;
      const job = draft({ retry_of, model, prompt, params, price_credits });
      this.add({ key: this.environment.newKey(), local: 'sending', job, source: null });
    }
  };

  /** Cancels; what is not known to be sent is sent first, for it may have been. */
  cancel = async (key: string): Promise<void> => {
    const known = this.find(key);
    if (!known) return;
    if (known.local === 'refused') return this.drop(key);
    this.change(key, { cancel_requested: true });
    if (known.local) return;
    try {
      this.merge(await this.api.cancel(known.job.job_id));
    } catch (error) {
      throwUnlessDarkroom(error);
      this.change(key, { cancel_requested: false });
    }
    await this.sync();
  };

  /** Shows the next page of the history. */
  loadMore = async (): Promise<void> => {
    const before = this.nextBefore;
    if (!before) return;
    this.nextBefore = null; // one at a time
    try {
      const page = await this.api.page(before);
      page.generations.forEach(this.merge);
      this.nextBefore = page.next_before;
    } catch (error) {
      throwUnlessDarkroom(error);
      this.nextBefore = before;
    }
    this.changed();
  };

  // --- sending ---

  private async send(): Promise<void> {
    if (this.isSending || !this.isAwake()) return;
    this.isSending = true;
    clearTimeout(this.sendTimer);
    try {
      for (let next; (next = this.generations.filter(isUnsent).pop()); this.failures = 0) {
        await this.sendOne(next);
      }
    } catch (error) {
      throwUnlessDarkroom(error);
      this.failures += 1;
      this.generations.filter(isUnsent).forEach(({ key }) => this.change(key, {}, 'waiting'));
      const wait = backoff(this.failures);
      if (this.isAwake()) this.sendTimer = setTimeout(() => void this.send(), wait);
    } finally {
      this.isSending = false;
      this.changed();
    }
  }

  private async sendOne({ key, job, source }: Generation): Promise<void> {
    const { storage } = this.environment;
    try {
      // On the device first: from here on it may be sent any number of times, and is done once.
      await storage.setItem(this.name('outbox', key), JSON.stringify(this.find(key)));
      if (source) await this.api.uploadSource(this.sourcePath(key), source.uri, source.contentType);
      const answer = job.retry_of
        ? await this.api.retry(job.retry_of)
        : await this.api.enqueue(job.model, job.prompt, job.params, key);
      this.take(key, answer);
    } catch (error) {
      throwUnlessDarkroom(error);
      if (error.isUnanswered || error.status === 401) throw error;
      this.change(key, { error: { code: error.token, message: error.detail } }, 'refused');
    }
    const isUnwanted = this.find(key)?.job.cancel_requested;
    await storage.removeItem(this.name('outbox', key));
    if (isUnwanted) await this.cancel(key);
  }

  /** Turns a placeholder into the job that was made of it. */
  private take(key: string, answer: EnqueueAnswer): void {
    const { job_id, status, credits_left, queue_position, eta_seconds } = answer;
    const poll_after_ms = answer.poll_after_ms ?? 0; // has it ended, its pictures are to be read
    this.charges += 1;
    if (this.entitlement) this.entitlement = { ...this.entitlement, credits: credits_left };
    if (this.generations.some((g) => g.key !== key && g.job.job_id === job_id)) {
      this.drop(key); // an older job answers this wish
    } else if (this.find(key)?.local) {
      this.change(key, { job_id, status, queue_position, eta_seconds, poll_after_ms }, null);
    }
    this.planRead();
  }

  // --- reading ---

  private sync = async (): Promise<void> => {
    this.isReadAgain = this.isReading;
    if (this.isReading || !this.isAwake()) return;
    this.isReading = true;
    try {
      do {
        this.isReadAgain = false;
        await this.read();
        this.failures = 0;
      } while (this.isReadAgain && this.isAwake());
      this.planRead();
    } catch (error) {
      throwUnlessDarkroom(error);
      this.failures += 1;
      this.planRead(backoff(this.failures));
    } finally {
      this.isReading = false;
      this.changed();
    }
  };

  private async read(): Promise<void> {
    let asked = this.generations.filter(isActive).map(({ job }) => job.job_id);
    const isPageRead = this.isPageStale;
    if (isPageRead) {
      const [page, models] = await Promise.all([this.api.page(null), this.api.models()]);
      this.models = models;
      this.takeFirstPage(page);
      this.isPageStale = false;
      asked = asked.filter((id) => !page.generations.some((job) => job.job_id === id));
    }
    if (!isPageRead || asked.length) {
      asked = asked.slice(0, 100);
      const jobs = await this.api.activeJobs(asked);
      const gone = asked.filter((id) => !jobs.some((job) => job.job_id === id));
      this.generations = this.generations.filter(({ job }) => !gone.includes(job.job_id));
      jobs.forEach(this.merge);
    }
    this.changed();
    if (!this.isEntitlementStale) return;
    const charges = this.charges;
    const entitlement = await this.api.entitlement();
    if (charges !== this.charges) return; // it may be from before the last charge
    this.entitlement = entitlement;
    this.isEntitlementStale = false;
  }

  /** Takes the newest page. What is older stays if the page reaches it and there is more. */
  private takeFirstPage({ generations: jobs, next_before }: Page): void {
    const ids = jobs.map((job) => job.job_id);
    const [newest = '', oldest = ''] = [ids[0], ids.at(-1)];
    const isKnown = this.generations.some(({ job }) => ids.includes(job.job_id));
    const reaches = this.nextBefore !== undefined && next_before !== null && isKnown;
    this.generations = this.generations.filter(
      ({ local, job: { job_id: id } }) =>
        local || ids.includes(id) || id > newest || (reaches && id < oldest),
    );
    if (!reaches) this.nextBefore = next_before;
    jobs.forEach(this.merge);
  }

  /** Takes what a read tells of a job, in the place of what was known. */
  private merge = (job: Job): void => {
    const isHere = (g: Generation) =>
      g.job.job_id === job.job_id ||
      (g.local && (g.key === job.idempotency_key || isRetry({ ...g, job }, g.job.retry_of)));
    const known = this.generations.find(isHere);
    if (!known) {
      const before = (g: Generation) => g.local !== null || g.job.job_id > job.job_id;
      const at = this.generations.filter(before).length;
      const found: Generation = { key: job.job_id, local: null, job, source: null };
      this.generations = this.generations.toSpliced(at, 0, found);
    } else if (isFinished(job) || !isFinished(known.job)) {
      // else it was overtaken: what has ended stays so
      const isRefunded = !isFinished(known.job) && job.refunded_credits > 0;
      this.isEntitlementStale ||= known.local !== null || isRefunded;
      this.change(known.key, job, null);
    }
  };

  /** Reads again after a while, or when the first of the active jobs asks for it. */
  private planRead(wait?: number): void {
    const waits = this.generations.filter(isActive).map(({ job }) => job.poll_after_ms!);
    clearTimeout(this.readTimer);
    wait ??= Math.min(...waits);
    if (this.isAwake() && wait < Infinity) this.readTimer = setTimeout(this.sync, wait);
  }

  // --- the app comes and goes ---

  private isAwake = () => this.isRunning && this.environment.isVisible();

  /** Shown: reads, listens anew, reads again once it listens. Hidden: asks nothing at all. */
  private wake = (): void => {
    this.stopListening();
    this.stopListening = () => {};
    clearTimeout(this.readTimer);
    clearTimeout(this.sendTimer);
    if (!this.isAwake()) return;
    this.isPageStale = true;
    this.isEntitlementStale = true;
    void this.sync();
    void this.send();
    this.stopListening = this.listen((jobId) => {
      this.isPageStale ||= !!jobId && !this.generations.some((g) => g.job.job_id === jobId);
      void this.sync();
    });
  };

  // --- the list ---

  private find = (key: string) => this.generations.find((g) => g.key === key);

  private add(placeholder: Generation): void {
    this.generations = [placeholder, ...this.generations];
    this.changed();
    void this.send();
  }

  private change(key: string, news: Partial<Job>, local?: Generation['local']): void {
    this.generations = this.generations.map((g) =>
      g.key === key
        ? { ...g, local: local === undefined ? g.local : local, job: { ...g.job, ...news } }
        : g,
    );
    this.changed();
  }

  private drop(key: string): void {
    this.generations = this.generations.filter((g) => g.key !== key);
    this.changed();
  }

  private look() {
    const { generations, models, entitlement } = this;
    const pending = generations.filter(isUnsent).reduce((sum, g) => sum + g.job.price_credits, 0);
    return {
      generations,
      models,
      entitlement,
      /** The balance when all that is on its way has been charged; null if not known. */
      credits: entitlement && Math.max(0, entitlement.credits - pending),
      hasMore: !!this.nextBefore,
      /** Whether the last request was answered, as far as is known. */
      isOnline: this.failures === 0,
    };
  }

  private changed(): void {
    this.snapshot = this.look();
    this.subscribers.forEach((tell) => tell());
    this.saveTimer ??= setTimeout(() => void this.save(), SAVE_AFTER_MS);
  }

  // --- the device ---

  private name = (...parts: string[]) => ['darkroom', this.userId, ...parts].join('.');

  private sourcePath = (key: string) => `${this.userId}/${key}`;

  private async save(): Promise<void> {
    this.saveTimer = undefined;
    const generations = this.generations.filter((g) => !g.local).slice(0, KEPT_GENERATIONS);
    const { models, entitlement } = this;
    const cache = JSON.stringify({ generations, models, entitlement });
    await this.environment.storage.setItem(this.name('cache'), cache);
  }

  private async load(): Promise<void> {
    const { storage } = this.environment;
    const all = await storage.getAllKeys();
    const names = all.filter((name) => name.startsWith(this.name('outbox', ''))).sort().reverse();
    const texts = await Promise.all([this.name('cache'), ...names].map((name) => storage.getItem(name)));
    const [cache, ...unsent] = texts.map((text) => JSON.parse(text ?? 'null'));
    const known = new Set(this.generations.map((g) => g.key));
    const found: Generation[] = [...unsent, ...(cache?.generations ?? [])];
    this.generations = [...this.generations, ...found.filter((g) => g && !known.has(g.key))];
    this.models = cache?.models ?? [];
    this.entitlement = cache?.entitlement ?? null;
    this.changed();
  }
}
