// The slider along a picture's path; without scripts all frames are there to be seen.
const frames = [...document.querySelectorAll("[data-frame]")];
const big = document.querySelector(".big"), scrub = document.querySelector(".scrub");
const slider = scrub.querySelector("input"), told = scrub.querySelector("output");
function show() {
  const frame = frames[slider.value];
  big.replaceChildren(frame.querySelector(".two").cloneNode(true));
  told.textContent = frame.querySelector("figcaption").textContent;
}
slider.addEventListener("input", show);
scrub.hidden = big.hidden = false;
show();
