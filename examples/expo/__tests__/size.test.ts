/** What another app takes over is small, and depends on next to nothing. */
interface Files {
  readdirSync(folder: string): string[];
  readFileSync(file: string, encoding: 'utf8'): string;
}
declare const __dirname: string; // an app knows no files: these types are not for its code

const { readdirSync, readFileSync } = jest.requireActual<Files>('fs');
const folder = `${__dirname}/../src/darkroom`;
const files = readdirSync(folder).filter((name) => name !== 'database.types.ts');
const sources = files.map((name): [string, string] => [
  name,
  readFileSync(`${folder}/${name}`, 'utf8'),
]);

const withoutComments = (source: string) =>
  source.replace(/\/\*[^]*?\*\//g, '').replace(/(^|\s)\/\/.*$/gm, '');
const codeOf = (source: string) =>
  withoutComments(source).split('\n').filter((line) => line.trim() !== '');

/** What is for React: the list as a hook, and a picture as a hook, on phones and in browsers. */
const HOOKS = ['useGenerations.ts', 'usePicture.ts', 'usePicture.web.ts'];
const isHook = ([name]: [string, string]) => HOOKS.includes(name);
const linesOf = (some: [string, string][]) => some.flatMap(([, source]) => codeOf(source)).length;

test('it has fewer than 500 lines of code without its hooks, which have fewer than 100', () => {
  const core = linesOf(sources.filter((source) => !isHook(source)));
  const hooks = linesOf(sources.filter(isHook));

  expect(core).toBeGreaterThan(300);
  expect(core).toBeLessThan(500);
  expect(hooks).toBeGreaterThan(50);
  expect(hooks).toBeLessThan(100);
});

test.each(sources)('%s has no line of more than 100 columns', (_, source) => {
  expect(source.split('\n').filter((line) => line.length > 100)).toEqual([]);
});

test.each(sources)('%s imports nothing but supabase-js and, for hooks, react', (name, source) => {
  const imported = [...withoutComments(source).matchAll(/(?:from|import|require\()\s*'([^']+)'/g)];
  const packages = imported.map(([, name]) => name!).filter((name) => !name.startsWith('./'));
  const allowed = ['@supabase/supabase-js', 'react'];
  if (name === 'usePicture.ts') allowed.push('expo-image'); // its cache is to be forgotten

  expect(packages.filter((name) => !allowed.includes(name))).toEqual([]);
});

test.each(sources)('%s draws nothing', (name, source) => {
  expect(name).toMatch(/\.ts$/);
  expect(withoutComments(source)).not.toMatch(/react-native|StyleSheet|createElement|<View/);
});

test('only the hooks need React', () => {
  const needing = sources.filter(([, source]) => source.includes("from 'react'"));

  expect(needing.map(([name]) => name)).toEqual(HOOKS);
});
