/** Darkroom's functions as methods: typed, bounded in time, with errors one can act on. */
import type { SupabaseClient } from '@supabase/supabase-js';

import type { Database } from './database.types';
import type { EnqueueAnswer, Entitlement, Job, Model, Page } from './types';

export type Client = SupabaseClient<Database>;
export type Api = ReturnType<typeof createApi>;

/** A request without an answer for so long counts as lost. */
const TIMEOUT_MS = 15_000; // of an upload eight times that

type Functions = Database['public']['Functions'];
type Call = { [F in keyof Functions]: [name: F, args: Functions[F]['Args']] }[keyof Functions];

/** Why a call did not succeed. */
export class DarkroomError extends Error {
  constructor(
    /** Stable: `insufficient_credits`, `invalid_input` ...; `unreachable` if no answer came. */
    readonly token: string,
    /** The HTTP status, 0 without an answer. */
    readonly status: number,
    /** What is wrong and what to do, for people. */
    readonly detail = '',
    /** Nobody knows whether it was done, or it lacks a session: repeat it, with the same key. */
    readonly isUnanswered = false,
    /** Before this many milliseconds it is refused again; 0 if nobody said. */
    readonly retryAfterMs = 0,
  ) {
    super(token);
  }
}

const unreachable = (status = 0, why = '') => new DarkroomError('unreachable', status, why, true);

/** Whether a status says nothing of the request: somebody on the way answered, or nobody. */
const isOnTheWay = (status: number) => status < 400 || status >= 500 || [408, 429].includes(status);

function inTime<T>(ms: number, request: (signal: AbortSignal) => PromiseLike<T>): Promise<T> {
  const abort = new AbortController();
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      abort.abort();
      reject(unreachable(0, 'There was no answer in time.'));
    }, ms);
    void request(abort.signal).then(resolve, reject).then(() => clearTimeout(timer));
  });
}

export function createApi(supabase: Client) {
  /** Calls a function; with an expired session once more, after refreshing it. */
  async function send<T>([name, args]: Call, get: boolean, again = true): Promise<T> {
    // supabase-js would repeat reads by itself: here whoever asked decides that.
    const request = (signal: AbortSignal) =>
      supabase.rpc(name as never, args as never, { get }).retry(false).abortSignal(signal);
    const { data, error, status } = await inTime(TIMEOUT_MS, request);
    if (!error && data !== null) return data as T;
    if (status === 401 && again && (await supabase.auth.refreshSession()).data.session) {
      return send([name, args] as Call, get, false);
    }
    // Codes PT... are the database's own, whatever the status. PostgREST says 400 without a code
    // where the database hung up.
    const isTold = error?.code?.startsWith('PT') || (error?.code !== '' && !isOnTheWay(status));
    if (!error || !isTold) throw unreachable(status, error?.message);
    const detail = [error.details, error.hint].filter(Boolean).join('. ');
    // The database can be read, but not written. A standby says so in code 0A000.
    const isReadOnly = error.message === 'unavailable' || /^(0A000|25006)$/.test(error.code);
    const token = isReadOnly ? 'unavailable' : error.message;
    // Pages see no Retry-After.
    const [, seconds = 0] = /^Try again in (\d+) seconds\.$/.exec(error.hint ?? '') ?? [];
    throw new DarkroomError(token, status, detail, status === 401 || isReadOnly, 1_000 * +seconds);
  }

  const read = <T>(...call: Call) => send<T>(call, true);
  const write = <T>(...call: Call) => send<T>(call, false);

  return {
    /** Warms the path to the database. Nobody should wait for it. */
    ping: () => read<{ ok: true; server_time: string }>('ping', {}),
    models: () => read<Model[]>('list_models', {}),
    entitlement: () => read<Entitlement>('get_entitlement', {}),
    /** A page of the history, newest first: what comes before `before`. */
    page: (before: string | null) =>
      read<Page>('list_generations', { page_size: 20, ...(before && { before }) }),
    /** All active jobs, and these whatever their state. */
    activeJobs: (job_ids: string[]) => read<Job[]>('list_active_jobs', { job_ids }),
    /** Asks for a picture at the price that was seen. Safe to repeat with its key. */
    enqueue: (asked: Required<Functions['enqueue_generation']['Args']>) =>
      write<EnqueueAnswer>('enqueue_generation', asked),
    /** Asks again for what failed or was canceled. Safe to repeat. */
    retry: (job_id: string, max_price_credits: number) =>
      write<EnqueueAnswer>('retry_generation', { job_id, max_price_credits }),
    cancel: (job_id: string) => write<Job>('cancel_generation', { job_id }),
    /** All the others: `api.call('set_tags', { job_id, tags })`. */
    call: write,

    /** Puts a source picture where only its user can read it. Safe to repeat. */
    async uploadSource(path: string, { uri, contentType }: { uri: string; contentType: string }) {
      const content = await fetch(uri).then((file) => file.arrayBuffer()).catch(() => null);
      if (!content) throw new DarkroomError('source_lost', 0, 'It is no longer on this device.');
      const options = { contentType, upsert: true };
      const bucket = supabase.storage.from('inputs');
      const { error } = await inTime(8 * TIMEOUT_MS, () => bucket.upload(path, content, options));
      const status = error?.status ?? 0;
      if (error && isOnTheWay(status)) throw unreachable(status, error.message);
      if (error) throw new DarkroomError('source_refused', status, error.message, status === 401);
    },
  };
}
