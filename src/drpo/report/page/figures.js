// Draws the figures that Python made, one after the other, with a breath between them so that the page answers meanwhile.

async function drawFigures() {
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  const { template, figures } = JSON.parse(await payloadText("figures"));
  document.head.append(Object.assign(document.createElement("script"), { textContent: await payloadText("plotly") }));
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  for (const [id, { data, layout }] of Object.entries(figures)) {
    await Plotly.newPlot(id, data, { ...layout, template }, config);
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.documentElement.dataset.drawn = "yes";
}

await drawFigures();
