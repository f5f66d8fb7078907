// Gives the exported page a picture and prints what it computed: node page.mjs URL PICTURE BROWSER
import { chromium } from "playwright-core";

const [url, picture, executablePath] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 400, height: 800 } });
const addresses = [], errors = [];
page.on("request", (request) => addresses.push(request.url()));
page.on("pageerror", (error) => errors.push(String(error)));
await page.goto(url);
await page.setInputFiles("input", picture);
await page.waitForFunction("window.result || !/^(Loading|Looking|Ready)/.test(document.querySelector('#state').textContent)");
const found = await page.evaluate(`({
  ...Object.fromEntries(Object.entries(window.result ?? {}).map(([name, values]) => [name, [...values]])),
  state: document.querySelector("#state").textContent,
  shown: [...document.querySelectorAll("output")].map((output) => output.textContent),
  tooWide: document.documentElement.scrollWidth > innerWidth,
})`);
console.log(JSON.stringify({ ...found, addresses, errors }));
await browser.close();
