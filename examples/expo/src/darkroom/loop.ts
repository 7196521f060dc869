/** One thing done again and again, never twice at a time: when asked, when due, after failures. */
import { DarkroomError } from './api';

const FIRST_PAUSE_MS = 1_000;
const LONGEST_PAUSE_MS = 30_000;

export class Loop {
  /** In a row. */
  failures = 0;
  isBusy = false;
  private isAskedAgain = false;
  private dueAt = Infinity;
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(
    /** While the app is away nothing is done. */
    private readonly isAwake: () => boolean,
    private readonly step: () => Promise<void>,
    private readonly ended: (isDone: boolean) => void,
  ) {}

  /** Does it now. Once more after that if it was busy, which may have been too early. */
  now = async (): Promise<void> => {
    this.isAskedAgain = this.isBusy;
    if (this.isBusy || !this.isAwake()) return;
    this.isBusy = true;
    clearTimeout(this.timer);
    this.dueAt = Infinity;
    const error: unknown = await this.step().then(() => null, (reason) => reason);
    this.isBusy = false;
    // What was cut off because the app was away says nothing of the network.
    if (!error) this.failures = 0;
    else if (this.isAwake() && !this.isAskedAgain) this.failures += 1;
    const pause = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (this.failures - 1));
    if (error) this.within(Math.max(pause, (error as Partial<DarkroomError>).retryAfterMs ?? 0));
    this.ended(!error);
    if (error && !(error instanceof DarkroomError)) throw error; // a mistake in here
    if (this.isAskedAgain) await this.now();
  };

  /** Does it in so many milliseconds, or before. */
  within(wait: number): void {
    if (Date.now() + wait >= this.dueAt) return;
    clearTimeout(this.timer);
    this.dueAt = Date.now() + wait;
    this.timer = setTimeout(this.now, wait);
  }
}
