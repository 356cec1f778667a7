// Checks that the Content-Security-Policy of a page has the hashes of its script and its style.
//
//   node tests/browser/csp.mjs examples/chat.html            prints the result; status 1 if the hashes are stale
//   node tests/browser/csp.mjs examples/chat.html --write    writes the right hashes

import { createHash } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';

function fail(message) {
  console.error(message);
  process.exit(1);
}

function onlyBlock(page, tag) {
  const blocks = [...page.matchAll(new RegExp(`<${tag}\\b[^>]*>([\\s\\S]*?)</${tag}>`, 'g'))];
  if (blocks.length !== 1) fail(`${file} must have exactly one <${tag}>, but it has ${blocks.length}.`);
  return blocks[0][1];
}

function hash(text) {
  // A browser hashes the text after its parser removed carriage returns, which a checkout on Windows may have.
  return `'sha256-${createHash('sha256').update(text.replace(/\r\n?/g, '\n')).digest('base64')}'`;
}

const file = process.argv.slice(2).find(argument => !argument.startsWith('--'));
const write = process.argv.includes('--write');
if (!file) fail('Usage: node csp.mjs PAGE [--write]');

const page = readFileSync(file, 'utf8');
let updated = page;
for (const tag of ['script', 'style']) {
  const source = new RegExp(`(http-equiv="Content-Security-Policy" content="[^"]*${tag}-src )[^;"]*`);
  if (!source.test(updated)) fail(`${file} has no Content-Security-Policy with ${tag}-src.`);
  const expected = hash(onlyBlock(page, tag));
  // A page that imports modules of its own server also has 'self'.
  const imports = tag === 'script' && /\bimport\b[^;]*'\.\//.test(onlyBlock(page, tag)) ? "'self' " : '';
  updated = updated.replace(source, (_, before) => before + imports + expected);
}

if (updated === page) console.log(`The hashes in ${file} are up to date.`);
else if (write) {
  writeFileSync(file, updated);
  console.log(`Updated the stale hashes in ${file}.`);
} else fail(`The hashes in ${file} are stale: run "node tests/browser/csp.mjs ${file} --write".`);
