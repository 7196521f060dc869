/** What the app says of a generation, a model, the balance, and who signs in. */
import type { AuthError } from '@supabase/supabase-js';

import {
  type DarkroomError,
  type Entitlement,
  type Generation,
  type Job,
  type Model,
  priceOf,
} from '../darkroom';
import { canUse } from '../draft';

/** Refusals by their token; of a job that failed the server says itself what to show. */
const REFUSALS: Record<string, string> = {
  insufficient_credits: 'Not enough credits for this model.',
  in_debt: 'Credits that were taken back are still owed.',
  account_blocked: 'This account cannot ask for pictures.',
  requires_paid_plan: 'This model is part of the paid plan.',
  too_many_active: 'You have as many pictures under way as your plan allows.',
  rate_limited: 'That was a lot at once. Give it a moment.',
  busy: 'There is a long line right now. Try again in a while.',
  not_found: 'That model, or the picture made of this wish, is gone.',
  budget_spent: 'No more of these can be made for now. Try another model, or later.',
  model_paused: 'This model is paused. Try another one, or later.',
  source_lost: 'The picture to start from is no longer on this device.',
  source_refused: 'The picture to start from was not accepted.',
};

/** What Supabase Auth refuses, by its code. */
const AUTH_REFUSALS: Record<string, string> = {
  invalid_credentials: 'Email or password is wrong.',
  email_not_confirmed: 'Confirm your address first: a mail with a link was sent to it.',
  email_exists: 'There is an account with this address. Sign in instead.',
  user_already_exists: 'There is an account with this address. Sign in instead.',
  weak_password: 'That password is too easy to guess. Choose a longer one.',
  same_password: 'That is the password you have. Choose another one.',
  otp_expired: 'That code is wrong or too old.',
  over_email_send_rate_limit: 'A mail was sent just now. Wait a minute before the next one.',
  over_request_rate_limit: 'Too many tries. Wait a minute.',
};

const LATE_MS = 60_000;

const seconds = (count: number) =>
  count < 90 ? `about ${Math.max(1, Math.round(count))} s` : `about ${Math.round(count / 60)} min`;

const dayOf = (time: Date) => time.toLocaleDateString('en-GB', { day: 'numeric', month: 'long' });

export const credits = (count: number) => `${count} credit${count === 1 ? '' : 's'}`;

export const price = (model: Model, to: Entitlement | null) =>
  priceOf(model, to) === 0 ? 'included' : credits(priceOf(model, to));

/** Why this model cannot be used; null if it can. */
export function notice(model: Model, by: Entitlement | null): string | null {
  if (canUse(model, by)) return null;
  if (model.paused_until === null) return 'For paid users';
  const end = new Date(model.paused_until); // there is none where it is `infinity`
  if (Number.isNaN(end.getTime())) return 'Paused';
  const isToday = end.toDateString() === new Date().toDateString();
  return `Paused until ${isToday ? end.toTimeString().slice(0, 5) : dayOf(end)}`;
}

/** What is missing for this price; null if nothing is, or the balance is not known. */
export const lacking = (costs: number, balance: number | null) =>
  balance === null || balance >= costs ? null : `Needs ${costs}, you have ${balance}`;

export const signInProblem = ({ code = '', message, status = 0 }: AuthError) =>
  AUTH_REFUSALS[code] ??
    (status > 0 && status < 500 ? message : 'The server cannot be reached right now.');

/** What is owed, or what of the balance ends next; null if neither. */
export function warning(of: Entitlement | null): string | null {
  if (of?.debt) return `${credits(of.debt)} owed: the next ones pay that.`;
  const next = of?.credits_ending?.[0]; // not in what older versions have kept
  if (!next) return null;
  const day = dayOf(new Date(next.expires_at));
  return `${credits(next.credits)} end${next.credits === 1 ? 's' : ''} on ${day}`;
}

function givenBack({ refunded_credits: count }: Job): string {
  return count > 0 ? ` ${credits(count)} given back.` : '';
}

/** Where it is. */
export function progress({ local, job }: Generation): string {
  if (job.cancel_requested) return 'Canceling';
  if (local === 'sending') return 'Sending';
  if (local === 'waiting') return 'Kept here, sent when the network is back';
  if (job.status === 'queued') {
    const ahead = job.queue_position;
    return ahead === null ? 'In line' : ahead ? `${ahead} ahead` : 'Next in line';
  }
  return job.stage === 'storing' ? 'Fixing' : `Developing ${job.progress ?? 0} %`;
}

/** How long it takes from here; null if there is nothing to say. */
export function duration(generation: Generation, now: number): string | null {
  const { eta_seconds: eta } = generation.job;
  const left = eta === null || generation.local ? [] : [seconds(eta)];
  const late = isLate(generation, now) ? ['taking longer than usual'] : [];
  const text = [...late, ...left].join(', ');
  return text ? text[0]!.toUpperCase() + text.slice(1) : null;
}

/** Whether it has been waited for longer than one does, by the server's time. */
export const isLate = ({ local, job }: Generation, now: number) =>
  !local && job.poll_after_ms !== null && now - Date.parse(job.created_at) > LATE_MS;

/** Why something was not done. */
export function problem(why: unknown): string {
  const { token = '', detail = '' } = why as Partial<DarkroomError>;
  if (token === 'unreachable') return 'No connection: nothing was changed.';
  return token === 'not_found' ? 'It is gone.' : detail || 'That did not work.';
}

/** Why there is no picture; null while there may be one. */
export function reason({ local, job }: Generation): string | null {
  if (local === 'refused') {
    if (job.error?.code === 'price_changed') {
      return `The price changed to ${credits(job.price_credits)}.`;
    }
    return REFUSALS[job.error?.code ?? ''] ?? (job.error?.message || 'It was not accepted.');
  }
  if (job.status === 'canceled') return `Canceled.${givenBack(job)}`;
  if (job.status !== 'failed') return null;
  return `${job.error?.message ?? 'It failed.'}${givenBack(job)}`;
}
