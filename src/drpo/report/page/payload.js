// Data out of the file: base64, then gzip.

async function payload(name) {
  const binary = atob(document.getElementById(`payload-${name}`).textContent);
  const bytes = Uint8Array.from(binary, (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function payloadText(name) {
  return new TextDecoder().decode(await payload(name));
}
