// Shows one step's rollouts at a time, and a token's numbers beside the pointer. Without it the page shows all steps.
const view = document.querySelector(".tokenview");
if (view) {
  const tip = document.getElementById("tip");
  const buttons = [...view.querySelectorAll(".steps button")];
  const groups = [...view.querySelectorAll(".stepgroup")];
  const show = (step) => {
    for (const group of groups) group.hidden = group.dataset.step !== step;
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.step === step);
  };
  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.step));
  show(buttons[buttons.length - 1].dataset.step);
  for (const group of groups) group.querySelector("h3").hidden = true; // the pressed button says it

  view.addEventListener("pointerover", (event) => {
    const chip = event.target.closest(".t");
    tip.hidden = !chip;
    if (!chip) return;
    if (chip.title) { chip.dataset.tip = chip.title; chip.title = ""; }
    tip.textContent = chip.dataset.tip;
    const box = chip.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
  });
  view.addEventListener("pointerleave", () => { tip.hidden = true; });
}
