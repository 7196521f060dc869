/** Darkroom's functions as methods: typed, bounded in time, with errors one can act on. */
import type { SupabaseClient } from '@supabase/supabase-js';

import type { Database } from './database.types';
import type { EnqueueAnswer, Entitlement, Job, Model, Page, Params } from './types';

export type Client = SupabaseClient<Database>;
export type Api = ReturnType<typeof createApi>;

/** A request without an answer for so long counts as lost. */
const TIMEOUT_MS = 15_000;

type Functions = Database['public']['Functions'];

interface Answers {
  ping: { ok: true; server_time: string };
  list_models: Model[];
  get_entitlement: Entitlement;
  list_generations: Page;
  list_active_jobs: Job[];
  enqueue_generation: EnqueueAnswer;
  retry_generation: EnqueueAnswer;
  cancel_generation: Job;
}

/** Why a call did not succeed. */
export class DarkroomError extends Error {
  constructor(
    /** Stable: `insufficient_credits`, `invalid_input` ...; `unreachable` if no answer came. */
    readonly token: string,
    /** The HTTP status, 0 without an answer. */
    readonly status: number,
    /** What is wrong and what to do, for people. */
    readonly detail = '',
    /** Nobody knows whether it was done: repeat it, with the same key. */
    readonly isUnanswered = false,
  ) {
    super(token);
  }
}

export function createApi(supabase: Client) {
  /** Calls a function; with an expired session once more, after refreshing it. */
  async function call<F extends keyof Answers>(
    name: F,
    args: Functions[F]['Args'],
    { get = false, isRepeated = false } = {},
  ): Promise<Answers[F]> {
    const abort = new AbortController();
    const timer = setTimeout(() => abort.abort(), TIMEOUT_MS);
    const { data, error, status } = await supabase
      .rpc(name as never, args as never, { get })
      .retry(false) // supabase-js would repeat reads by itself: here whoever asked decides that
      .abortSignal(abort.signal);
    clearTimeout(timer);
    if (!error) return data as Answers[F];
    if (status === 401 && !isRepeated && (await supabase.auth.refreshSession()).data.session) {
      return call(name, args, { get, isRepeated: true });
    }
    // Codes PT... are the database's own. Other errors from 500 on are somebody's on the way.
    if (status === 0 || ((status >= 500 || status === 429) && !error.code?.startsWith('PT'))) {
      throw new DarkroomError('unreachable', status, error.message, true);
    }
    throw new DarkroomError(
      error.message,
      status,
      [error.details, error.hint].filter(Boolean).join('. '),
    );
  }

  const read = { get: true };

  return {
    /** Warms the path to the database. Nobody should wait for it. */
    ping: () => call('ping', {}, read),
    models: () => call('list_models', {}, read),
    entitlement: () => call('get_entitlement', {}, read),
    /** A page of the history, newest first: what comes before `before`. */
    page: (before: string | null) =>
      call('list_generations', { page_size: 20, ...(before && { before }) }, read),
    /** All active jobs, and these whatever their state. */
    activeJobs: (job_ids: string[]) => call('list_active_jobs', { job_ids }, read),
    /** Asks for a picture. Safe to repeat with the same key: charged once. */
    enqueue: (model: string, prompt: string, params: Params, idempotency_key: string) =>
      call('enqueue_generation', { model, prompt, params, idempotency_key }),
    /** Asks again for what failed or was canceled. Safe to repeat. */
    retry: (job_id: string) => call('retry_generation', { job_id }),
    cancel: (job_id: string) => call('cancel_generation', { job_id }),

    /** Puts a source picture where only its user can read it. Safe to repeat. */
    async uploadSource(path: string, uri: string, contentType: string): Promise<void> {
      const content = await fetch(uri).then(
        (file) => file.arrayBuffer(),
        () => null,
      );
      if (!content) throw new DarkroomError('source_lost', 0, 'It is no longer on this device.');
      const options = { contentType, upsert: true };
      const { error } = await supabase.storage.from('inputs').upload(path, content, options);
      if (!error) return;
      const status = Number('status' in error && error.status) || 0;
      const isUnanswered = status === 0 || status === 401 || status >= 500;
      throw new DarkroomError('source_refused', status, error.message, isUnanswered);
    },
  };
}
