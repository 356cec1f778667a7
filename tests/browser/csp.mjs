// Checks that the Content-Security-Policy of a page names the hashes of its one script and its one style.
//
//   node tests/browser/csp.mjs examples/chat.html            says so and exits 1 if they are stale
//   node tests/browser/csp.mjs examples/chat.html --write    puts the right ones in

import { createHash } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';

function fail(sentence) {
  console.error(sentence);
  process.exit(1);
}

function onlyBlock(page, tag) {
  const blocks = [...page.matchAll(new RegExp(`<${tag}\\b[^>]*>([\\s\\S]*?)</${tag}>`, 'g'))];
  if (blocks.length !== 1) fail(`${file} must have exactly one <${tag}>, but it has ${blocks.length}.`);
  return blocks[0][1];
}

function hash(text) {
  // A browser hashes what its parser hands on, and that has no carriage returns: a checkout on Windows may have.
  return `'sha256-${createHash('sha256').update(text.replace(/\r\n?/g, '\n')).digest('base64')}'`;
}

const file = process.argv.slice(2).find(argument => !argument.startsWith('--'));
const write = process.argv.includes('--write');
if (!file) fail('Usage: node csp.mjs PAGE [--write]');

const page = readFileSync(file, 'utf8');
let right = page;
for (const tag of ['script', 'style']) {
  const source = new RegExp(`(http-equiv="Content-Security-Policy" content="[^"]*${tag}-src )[^;"]*`);
  if (!source.test(right)) fail(`${file} has no Content-Security-Policy with ${tag}-src.`);
  const wanted = hash(onlyBlock(page, tag));
  right = right.replace(source, (_, before) => before + wanted);
}

if (right === page) console.log(`The hashes in ${file} are right.`);
else if (write) {
  writeFileSync(file, right);
  console.log(`The hashes in ${file} were stale and are written.`);
} else fail(`The hashes in ${file} are stale: run "node tests/browser/csp.mjs ${file} --write".`);
