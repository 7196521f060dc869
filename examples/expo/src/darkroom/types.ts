/**
 * What Darkroom's functions answer. To PostgreSQL all of it is `json`, so the generated types
 * cannot know it: what is a column is taken from them, the rest is written down, and the tests hold
 * real answers against it. Times are ISO 8601.
 */
import type { Database, Json } from './database.types';

type Tables = Database['public']['Tables'];
type Columns<T extends keyof Tables, C extends keyof Tables[T]['Row']> = Pick<Tables[T]['Row'], C>;

export type Status = 'queued' | 'processing' | 'completed' | 'failed' | 'canceled';
export type Params = { [name: string]: Json };

type File = Columns<'images', 'preview_path' | 'content_type' | 'bytes' | 'blurhash'>;

/** One stored output. The paths are in the bucket `generations`. */
export interface JobImage extends File, Columns<'images', 'position' | 'width' | 'height'> {
  path: string;
  is_public: boolean;
}

type Times = Columns<'generations', 'created_at' | 'started_at' | 'finished_at'>;
type Wish = Columns<'generations', 'batch_id' | 'retry_of' | 'idempotency_key' | 'prompt'>;

/** One generation, as every function shows it. */
export interface Job extends Wish, Times, Columns<'generations', 'price_credits' | 'is_favorite'> {
  job_id: string;
  status: Status;
  stage: 'generating' | 'storing' | null;
  /** Percent. */
  progress: number | null;
  attempt: number | null;
  cancel_requested: boolean;
  /** Jobs ahead of it; null unless it is queued. */
  queue_position: number | null;
  /** Until it is likely to be finished; null if that is not known. */
  eta_seconds: number | null;
  /** When to read it again; null when it is finished. */
  poll_after_ms: number | null;
  model: string;
  alias: string | null;
  params: Params;
  refunded_credits: number;
  error: { code: string; message: string } | null;
  images: JobImage[];
  tags: string[];
}

/** queue_position and eta_seconds are null: the first read of the job tells them. */
export interface EnqueueAnswer
  extends Pick<Job, 'job_id' | 'status' | 'queue_position' | 'eta_seconds' | 'poll_after_ms'> {
  reused: boolean;
  credits_left: number;
  /** What was taken for the size that was asked for; null if just that. */
  size: Params | null;
}

/** The next page is what comes before `next_before`; null: there is none. */
export type Page = { generations: Job[]; next_before: string | null };

type Limits = Record<'max_active' | 'minute_jobs' | 'max_per_minute' | 'max_batch', number>;
type Known = 'user_id' | 'paid_until' | 'blocked_until' | 'credits' | 'debt';

export interface Entitlement extends Columns<'entitlements', Known>, Limits {
  /** `free`, `paid` or `guest`. */
  plan: string;
  /** What of the credits ends when, the earliest first. */
  credits_ending: { credits: number; expires_at: string }[];
  active_jobs: number;
  is_busy: boolean;
}

type Price = Columns<'models', 'price_credits' | 'paid_price_credits' | 'requires_paid'>;

/** Prices are per image. */
export interface Model extends Price, Columns<'models', 'id' | 'title' | 'max_images'> {
  /** Null unless it is paused; may be `infinity`. */
  paused_until: string | null;
  /** The JSON schema of each param. */
  inputs: { [name: string]: Json };
  /** Those params that take the path of a picture in the bucket `inputs`. */
  image_inputs: string[];
}
