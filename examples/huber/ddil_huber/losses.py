"""Its loss: what the learner knows of it."""

from ddil_dist.diffusion.ddim import x_0_of_transition
from learner.methods import STUDENT, ObjectiveOutput, StudentObjective


def create_objective(config, problem, networks, *, seed):
    return HuberObjective(problem.student_denoiser(networks[STUDENT]), problem.grid, config.objective.c)


class HuberObjective(StudentObjective):
    def __init__(self, student, grid, c):
        self.student, self.table, self.c = student, grid.teacher_table(), c

    def loss(self, batch):
        table = self.table.to(batch.x_t.device)
        t, s = table[batch.step_index, 0], table[batch.step_index, -1]
        target = x_0_of_transition(batch.x_t, batch.label, t, s, schedule=self.student.schedule)
        prediction = self.student.predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        distance = (self.student.x_0(prediction, batch.x_t, t) - target).square()
        per_sample = ((distance + self.c**2).sqrt() - self.c).flatten(1).mean(1)
        return ObjectiveOutput(loss=per_sample.mean(), per_sample=per_sample.detach())
