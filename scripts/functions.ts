/**
 * Serves supabase/functions/<name>/index.ts under /<name>: each is loaded when it is first called and
 * again when its file has changed, and what it hands to `Deno.serve` answers its requests. All of
 * them share this process, and the variables that Supabase gives them.
 */
type Handler = (request: Request, info: Deno.ServeHandlerInfo) => Response | Promise<Response>;
type Served = { handler?: Handler; onError?: (error: unknown) => Response | Promise<Response> };
type Loaded = { version: number; served: Promise<Served> };

const [root, address] = Deno.args;
const [hostname, port] = address.split(':');
const functions = new Map<string, Loaded>();
const { serve } = Deno;
let turn: Promise<unknown> = Promise.resolve(); // one is loaded at a time: they all call Deno.serve

const refuse = (status: number, code: string, message: string) =>
  Response.json({ code, message }, { status });

/** Runs a function's module and returns what it would serve. */
async function load(file: string, version: number): Promise<Served> {
  let served: Served = {};
  const capture = (...given: (Served | Handler)[]) => {
    for (const each of given) {
      served = { ...served, ...(typeof each === 'function' ? { handler: each } : each) };
    }
  };
  Object.assign(Deno, { serve: capture });
  const module = await import(`file://${file}?${version}`);
  served.handler ??= module.default?.fetch;
  if (!served.handler) throw new Error(`${file} serves nothing`);
  return served;
}

function find(name: string): Promise<Served> | null {
  const file = `${root}/${name}/index.ts`;
  let version;
  try {
    version = Deno.statSync(file).mtime?.getTime() ?? 0;
  } catch {
    return null;
  }
  const known = functions.get(name);
  if (known?.version === version) return known.served;
  const served = turn.then(() => load(file, version));
  turn = served.catch(() => {});
  functions.set(name, { version, served });
  return served;
}

addEventListener('unhandledrejection', (event) => {
  event.preventDefault(); // one function's fault is not the others' end
  console.error(event.reason);
});

serve({ hostname, port: Number(port), onListen() {} }, async (request, info) => {
  const [, name] = /^\/([\w-]+)(\/.*)?$/.exec(new URL(request.url).pathname) ?? [];
  const found = name && find(name);
  if (!found) return refuse(404, 'NOT_FOUND', 'Requested function was not found');
  let served: Served;
  try {
    served = await found;
  } catch (error) {
    console.error(error);
    return refuse(503, 'BOOT_ERROR', 'Function failed to start (please check logs)');
  }
  try {
    return await served.handler!(request, info);
  } catch (error) {
    if (served.onError) return await served.onError(error);
    console.error(error);
    return refuse(500, 'WORKER_ERROR', 'Function exited due to an error (please check logs)');
  }
});
