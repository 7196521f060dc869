/**
 * The user's generations as an app shows them, without a framework.
 *
 * State comes from reads only; answers and hints are reasons to read. A request is on the list
 * before it is sent, and on the device until it is answered: it is repeated with its key however
 * often its answer is lost, so it is done and charged once.
 */
import type { SupportedStorage } from '@supabase/supabase-js';

import { type Api, DarkroomError } from './api';
import { Loop } from './loop';
import type { EnqueueAnswer, Entitlement, Job, Model, Params } from './types';

/** What the device gives. */
export interface Environment {
  /** AsyncStorage, or made like it. */
  storage: SupportedStorage & { getAllKeys(): Promise<readonly string[]> };
  /** A new unique id, at most 255 characters. */
  newKey(): string;
  isVisible(): boolean;
  /** Calls back when the app was shown or hidden or the network is back; answers how to stop. */
  onChange(callBack: () => void): () => void;
}

/** A picture on the device, and the model's input that takes it, alone or in a list. */
export type Source = { uri: string; contentType: string; input: string; isList: boolean };

export interface Generation {
  /** Stays when the placeholder becomes the job: the key of its card. */
  key: string;
  /** Sending (it, or that it is canceled), waiting for the network, refused; null: it is there. */
  local: 'sending' | 'waiting' | 'refused' | null;
  /** As read last; of a placeholder what is known of it, with an empty `job_id`. */
  job: Job;
  source: Source | null;
}

/** A change that is shown over what was read until the server has it; null hides the card. */
type Edit = { key: string; news: Partial<Job> | null; send: () => Promise<void> };

/** The same wish again within this time, or before it was answered, is a double press. */
const SAME_PRESS_MS = 1_000;
const KEPT_GENERATIONS = 40;

/** Ids are in the order of time; what has none yet is newer than all. */
const idOf = ({ job }: Generation) => job.job_id || '~';
const isUnsent = ({ local }: Generation) => local === 'sending';
const isFinished = (job: Job) => job.poll_after_ms === null;
const isActive = ({ local, job }: Generation) => !local && !isFinished(job);
const hasFailed = ({ status }: Job) => status === 'failed' || status === 'canceled';
/** Of a job there is one retry that is under way or done, however often it is asked for. */
const isRetry = (job: Job, of: string | null) => !!of && job.retry_of === of && !hasFailed(job);
/** Whether the job is this generation, or came of it. */
const isOf = (found: Job, { key, local, job }: Generation) =>
  found.job_id === job.job_id ||
  (!!local && (found.idempotency_key === key || isRetry(found, job.retry_of)));
const byPress = (a: Generation, b: Generation) => (a.job.created_at < b.job.created_at ? 1 : -1);
const isGeneration = (found: Generation | null): found is Generation => !!found?.key && !!found.job;

/** What an image by this model costs this user, in credits. */
export const priceOf = (model: Model, of: Entitlement | null) =>
  of?.plan === 'paid' ? model.paid_price_credits : model.price_credits;

/** A job of which the server has not told yet. */
// deno-fmt-ignore
const draft = (known: Partial<Job>): Job => ({
  job_id: '', status: 'queued', stage: null, progress: null, attempt: null, queue_position: null,
  eta_seconds: null, poll_after_ms: 0, cancel_requested: false, model: '', alias: null,
  batch_id: null, retry_of: null, idempotency_key: null, prompt: '', params: {}, price_credits: 0,
  refunded_credits: 0, error: null, images: [], is_favorite: false, tags: [], started_at: null,
  finished_at: null, created_at: new Date().toISOString(), ...known,
});

export class GenerationStore {
  private generations: readonly Generation[] = [];
  private models: readonly Model[] = [];
  private entitlement: Entitlement | null = null;
  private nextBefore = ''; // the history is on the list from here ...
  private newest = ''; // ... up to here; what is newer came one by one
  private edits: readonly Edit[] = [];
  private press = { wish: '', key: '', at: 0 };

  private isStarted = false;
  private isStale = true;
  private isEntitlementStale = true;
  private written: Promise<void>;
  private stopWatching = () => {};
  private stopListening = () => {};
  private readonly subscribers = new Set<() => void>();
  private readonly isAwake = () => this.isStarted && this.environment.isVisible();
  private readonly sends = new Loop(this.isAwake, () => this.send(), (done) => this.ended(done));
  private readonly reads = new Loop(this.isAwake, () => this.read(), (done) => this.ended(done));
  private snapshot = this.look();

  /** `listen` takes what to call with hints, and answers how to stop: see realtime.ts. */
  constructor(
    private readonly api: Api,
    private readonly environment: Environment,
    private readonly userId: string,
    private readonly listen: (hint: () => void) => () => void = () => () => {},
  ) {
    this.written = this.load().catch(() => undefined).then(this.changed);
  }

  subscribe = (subscriber: () => void) => {
    this.subscribers.add(subscriber);
    return () => void this.subscribers.delete(subscriber);
  };

  getSnapshot = () => this.snapshot;

  /** Shows what the server tells. */
  start = (): void => {
    this.isStarted = true;
    this.stopWatching = this.environment.onChange(this.wake);
    this.wake();
  };

  /** Asks nothing and keeps nothing any more: the user may have signed out. */
  stop = (): void => {
    this.isStarted = false;
    this.stopWatching();
    this.wake();
  };

  /** Puts a placeholder on the list and sends the request; answers the key of its card. */
  generate = (model: Model, prompt: string, params: Params, source: Source | null = null) => {
    const wish = JSON.stringify([model.id, prompt, params, source?.uri]);
    const last = this.press.wish === wish && this.find(this.press.key);
    const isRecent = last && (isUnsent(last) || Date.now() - this.press.at < SAME_PRESS_MS);
    if (isRecent && !last.job.cancel_requested) return last.key;
    const key = this.environment.newKey();
    this.press = { wish, key, at: Date.now() };
    const path = this.sourcePath(key);
    const paths = source && { [source.input]: source.isList ? [path] : path };
    const price_credits = priceOf(model, this.entitlement);
    const job = { model: model.id, prompt, params: { ...params, ...paths }, price_credits };
    this.put({ key, local: 'sending', job: draft(job), source });
    return key;
  };

  /** Sends what was refused again; asks anew for what failed or was canceled. */
  retry = (key: string): void => {
    const known = this.find(key);
    if (known?.local === 'refused') this.change(key, { error: null }, { local: 'sending' });
    if (!known || !hasFailed(known.job)) return;
    const { job_id: retry_of, model, prompt, params, price_credits } = known.job;
    if (this.generations.some((g) => g.local !== 'refused' && isRetry(g.job, retry_of))) return;
    const job = draft({ retry_of, model, prompt, params, price_credits });
    this.put({ key: this.environment.newKey(), local: 'sending', job, source: null });
  };

  /** Cancels; what is not known to be sent is sent first, for it may have been. */
  cancel = (key: string): void => {
    if (this.find(key)?.local === 'refused') this.drop(key);
    else this.change(key, { cancel_requested: true }, { local: 'sending' });
  };

  /** Shows the next page of the history. */
  loadMore = async (): Promise<void> => {
    const before = this.nextBefore;
    if (!before) return;
    this.nextBefore = ''; // one at a time
    const page = await this.ask((api) => api.page(before)).catch(() => null);
    if (this.nextBefore) return; // meanwhile the list began anew, above a gap
    this.nextBefore = page ? (page.next_before ?? '') : before;
    this.merge(page?.generations ?? []);
  };

  // --- what is done with pictures: shown at once, or as before if the server does not take it ---

  favorite = (of: Generation, is_favorite: boolean) =>
    this.edit(of, { is_favorite }, ['set_favorite', { job_id: of.job.job_id, is_favorite }]);

  /** Takes a finished one away and ends its sharing; until it is erased, `restore` undoes it. */
  remove = (g: Generation) => this.edit(g, null, ['delete_generation', { job_id: g.job.job_id }]);

  /** Reads it, too, for its images are private now. */
  restore = (of: Generation) =>
    this.edit(of, { poll_after_ms: 0 }, ['restore_generation', { job_id: of.job.job_id }]);

  /** Shows an image to everybody, or no longer. */
  share = (of: Generation, image_position: number, is_public: boolean) => {
    const { job_id, ...job } = of.job;
    const images = job.images.map((i) => (i.position === image_position ? { ...i, is_public } : i));
    return this.edit(of, { images }, ['share_image', { job_id, image_position, is_public }]);
  };

  /** Sends it between two reads, so that none tells what was before; throws if it was not done. */
  private edit(of: Generation, news: Edit['news'], call: Parameters<Api['call']>): Promise<void> {
    const done = () => (news ? this.change(of.key, news, {}, of) : this.drop(of.key));
    return new Promise((resolve, reject) => {
      const send = () => this.ask((api) => api.call(...call)).then(done).then(resolve, reject);
      this.edits = [...this.edits, { key: of.key, news, send }];
      this.changed();
      void this.reads.now();
    });
  }

  // --- sending ---

  /** Sends in the order of the presses. */
  private async send(): Promise<void> {
    await this.written; // what is on the device comes first
    for (let next; (next = this.generations.findLast(isUnsent));) await this.sendOne(next);
  }

  private async sendOne(next: Generation): Promise<void> {
    const { key, job } = next;
    await this.written; // from here on it may be sent any number of times, and is done once
    let error: Job['error'] = null;
    try {
      if (!job.job_id) return this.take(key, await this.request(next));
      await this.ask((api) => api.cancel(job.job_id));
    } catch (why) {
      if (!(why instanceof DarkroomError) || why.isUnanswered) throw why;
      if (!job.job_id) error = { code: why.token, message: why.detail };
    }
    const [, price = job.price_credits] = /^the price is (\d+)/.exec(error?.message ?? '') ?? [];
    const news = error && { error, cancel_requested: false, price_credits: +price };
    this.isStale ||= !!error; // prices, plan, balance or pauses are not what was known
    this.change(key, news ?? {}, { local: error ? 'refused' : null });
    this.reads.within(0); // of one that was canceled, or had ended before, it tells how
  }

  private async request({ key, job, source }: Generation): Promise<EnqueueAnswer> {
    const { model, prompt, params, retry_of, price_credits: seen } = job;
    if (source) await this.ask((api) => api.uploadSource(this.sourcePath(key), source));
    const asked = { model, prompt, params, idempotency_key: key, max_price_credits: seen };
    return this.ask((api) => (retry_of ? api.retry(retry_of, seen) : api.enqueue(asked)));
  }

  /** Turns a placeholder into the job that was made of it. */
  private take(key: string, { credits_left, reused, ...news }: EnqueueAnswer): void {
    const known = this.find(key);
    const local = known?.job.cancel_requested ? 'sending' : null;
    const poll_after_ms = news.poll_after_ms ?? 0; // has it ended, its pictures are to be read
    // Where an older job answers this wish, its card is enough.
    if (this.generations.some((g) => g !== known && idOf(g) === news.job_id)) this.drop(key);
    else if (known?.local) this.change(key, { ...news, poll_after_ms }, { local });
    if (this.entitlement) this.entitlement = { ...this.entitlement, credits: credits_left };
    // A balance read meanwhile may be newer than this one, or about to be taken and older.
    const ends = !!this.entitlement?.credits_ending?.length;
    this.isEntitlementStale ||= !known?.local || this.reads.isBusy || ends;
    this.reads.within(poll_after_ms);
  }

  // --- reading ---

  private async read(): Promise<void> {
    await this.written; // what is on the device comes first
    for (const edit of this.edits) {
      await edit.send();
      this.edits = this.edits.filter((other) => other !== edit);
      this.changed();
    }
    if (this.isStale) {
      this.isStale = false;
      this.isEntitlementStale = true;
      await this.readFirstPage();
    } else {
      const asked = this.generations.filter(isActive).map(idOf).slice(-100); // the server's limit
      this.merge(await this.ask((api) => api.activeJobs(asked)), asked);
    }
    if (this.isEntitlementStale) {
      this.isEntitlementStale = false;
      this.entitlement = await this.ask((api) => api.entitlement());
    }
    const waits = this.generations.filter(isActive).map(({ job }) => job.poll_after_ms!);
    this.reads.within(Math.max(1_000, Math.min(...waits))); // no less, whatever was said
  }

  private async readFirstPage(): Promise<void> {
    const known = this.generations;
    const [page, models] = await this.ask((api) => Promise.all([api.page(null), api.models()]));
    const end = page.next_before ?? '';
    const reaches = end <= this.newest; // else there is a gap between it and what is older
    const covered = known.filter((g) => idOf(g) >= end || !(reaches || isActive(g))).map(idOf);
    if (!reaches) this.nextBefore = end;
    this.newest = page.generations[0]?.job_id ?? end;
    this.models = models;
    this.merge(page.generations, covered);
  }

  /** Takes what a read tells of jobs, in the place of what was known; `asked` in vain is gone. */
  private merge(jobs: readonly Job[], asked: readonly string[] = []): void {
    const gone = asked.filter((id) => !jobs.some((job) => job.job_id === id));
    this.generations = this.generations.filter((g) => g.local || !gone.includes(idOf(g)));
    for (const job of jobs) {
      const known = this.generations.find((g) => isOf(job, g));
      if (known && isUnsent(known) && known.job.cancel_requested) continue; // to be canceled first
      if (known && isFinished(known.job) && !isFinished(job)) continue; // overtaken by its end
      // Charged, elsewhere or here without an answer, or given back.
      this.isEntitlementStale ||= known?.local !== null || job.refunded_credits > 0;
      const key = known?.key ?? job.idempotency_key ?? job.job_id;
      this.put({ key, local: null, job, source: null });
    }
    this.changed();
  }

  // --- the app comes and goes ---

  /** Shown: reads, listens anew, reads again once it listens. Hidden: asks nothing at all. */
  private wake = (): void => {
    this.isStale = true;
    this.stopListening();
    this.stopListening = this.isAwake() ? this.listen(this.reads.now) : () => {};
    void this.reads.now();
    void this.sends.now();
  };

  private async ask<T>(request: (api: Api) => Promise<T>): Promise<T> {
    if (!this.isAwake()) throw new DarkroomError('hidden', 0, 'The app is hidden.', true);
    return request(this.api);
  }

  // --- the list ---

  private find = (key: string) => this.generations.find((g) => g.key === key);

  private change(key: string, news: Partial<Job>, more: Partial<Generation> = {}, or?: Generation) {
    const known = this.find(key) ?? or;
    if (known) this.put({ ...known, ...more, job: { ...known.job, ...news } });
  }

  /** After requests: what was told is kept; what was missed if they failed is read later. */
  private ended(isDone: boolean): void {
    this.isStale ||= !isDone;
    this.changed();
    const generations = this.generations.filter((g) => !g.local).slice(0, KEPT_GENERATIONS);
    this.write('cache', { generations, models: this.models, entitlement: this.entitlement });
  }

  /** Puts it where it was, or where its time is; keeps and sends what the server does not have. */
  private put(next: Generation): void {
    const known = this.find(next.key);
    if (known?.local || next.local) this.write(`outbox.${next.key}`, next.local ? next : null);
    const at = this.generations.findIndex((g) => (known ? g === known : idOf(g) <= idOf(next)));
    this.generations = this.generations.toSpliced(at < 0 ? Infinity : at, known ? 1 : 0, next);
    this.changed();
    if (isUnsent(next)) void this.sends.now();
  }

  private drop(key: string): void {
    this.generations = this.generations.filter((g) => g.key !== key);
    this.write(`outbox.${key}`, null);
    this.changed();
  }

  private changed = (): void => {
    this.snapshot = this.look();
    this.subscribers.forEach((tell) => tell());
  };

  private look() {
    const { models, entitlement } = this;
    /** Whether requests get through, as far as is known. */
    const isOnline = this.reads.failures + this.sends.failures === 0;
    const generations = this.generations.flatMap((g): Generation[] => {
      const news = this.edits.filter(({ key }) => key === g.key).map((edit) => edit.news);
      const local = isUnsent(g) && !isOnline ? 'waiting' : g.local;
      if (news.length === 0 && local === g.local) return [g];
      return news.includes(null) ? [] : [{ ...g, local, job: Object.assign({}, g.job, ...news) }];
    });
    const price = (g: Generation) => (isUnsent(g) && !g.job.job_id ? g.job.price_credits : 0);
    const pending = this.generations.reduce((sum, g) => sum + price(g), 0);
    /** The balance when all that is on its way has been charged; null if not known. */
    const credits = entitlement && Math.max(0, entitlement.credits - pending);
    return { generations, models, entitlement, credits, hasMore: this.nextBefore !== '', isOnline };
  }

  // --- the device ---

  private sourcePath = (key: string) => `${this.userId}/${key}`;
  private name = (name: string) => `darkroom.${this.userId}.${name}`;

  /** One after the other. What the device does not take is shown and sent all the same. */
  private write(name: string, value: object | null): void {
    const { storage } = this.environment;
    const text = JSON.stringify(value);
    const write = async () => {
      if (!value) await storage.removeItem(this.name(name));
      else if (this.isStarted) await storage.setItem(this.name(name), text);
    };
    this.written = this.written.then(write).catch(() => undefined);
  }

  /** Shows what is on the device. What cannot be read there is as good as not there. */
  private async load(): Promise<void> {
    const { storage } = this.environment;
    const read = async (name: string) => JSON.parse((await storage.getItem(name)) ?? 'null');
    const names = (await storage.getAllKeys()).filter((n) => n.startsWith(this.name('outbox.')));
    const unsent = await Promise.all(names.map((name) => read(name).catch(() => null)));
    this.generations = [...this.generations, ...unsent.filter(isGeneration).sort(byPress)];
    const { generations, models, entitlement } = await read(this.name('cache'));
    const isNew = (g: Generation) => isGeneration(g) && !this.find(g.key);
    this.generations = [...this.generations, ...generations.filter(isNew)];
    this.models = [...models];
    this.entitlement = entitlement;
  }
}
