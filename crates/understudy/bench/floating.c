/* Double precision: a product of matrices, planets, and the Mandelbrot set. */
#include "kernels.h"

#include <math.h>
#include <string.h>

static void show_double(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    show(bits);
}

#define SIDE 256

static double left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];

int matrix(void)
{
    for (int row = 0; row < SIDE; row++) {
        for (int column = 0; column < SIDE; column++) {
            left[row][column] = 1.0 / (row + column + 1);
            right[row][column] = (row - column) * 0.125;
        }
    }
    for (int turn = 0; turn < 15; turn++) {
        for (int row = 0; row < SIDE; row++) {
            for (int k = 0; k < SIDE; k++) {
                double factor = left[row][k];
                for (int column = 0; column < SIDE; column++)
                    product[row][column] += factor * right[k][column];
            }
        }
    }
    double sum = 0;
    for (int i = 0; i < SIDE; i++)
        sum += product[i][SIDE - 1 - i];
    show_double(sum);
    return 0;
}

#define BODIES 5

static double place[BODIES][3], speed[BODIES][3], mass[BODIES];

static void pull(double time)
{
    for (int i = 0; i < BODIES; i++) {
        for (int j = i + 1; j < BODIES; j++) {
            double apart[3], square = 0.01;
            for (int d = 0; d < 3; d++) {
                apart[d] = place[i][d] - place[j][d];
                square += apart[d] * apart[d];
            }
            double force = time / (square * sqrt(square));
            for (int d = 0; d < 3; d++) {
                speed[i][d] -= apart[d] * mass[j] * force;
                speed[j][d] += apart[d] * mass[i] * force;
            }
        }
    }
    for (int i = 0; i < BODIES; i++) {
        for (int d = 0; d < 3; d++)
            place[i][d] += time * speed[i][d];
    }
}

int nbody(void)
{
    uint64_t state = 88172645463325252ULL;
    for (int i = 0; i < BODIES; i++) {
        mass[i] = i ? 0.01 : 30.0;
        for (int d = 0; d < 3; d++) {
            place[i][d] = (double)(next(&state) % 2000) / 100 - 10;
            speed[i][d] = (double)(next(&state) % 2000) / 1000 - 1;
        }
    }
    for (int step = 0; step < 1000000; step++)
        pull(0.001);
    show_double(place[1][0] + place[2][1] + place[3][2]);
    return 0;
}

int mandelbrot(void)
{
    uint64_t inside = 0;
    for (int y = 0; y < 1000; y++) {
        for (int x = 0; x < 1000; x++) {
            double c_re = x / 375.0 - 2.0, c_im = y / 375.0 - 1.333, re = 0, im = 0;
            int turn = 0;
            while (turn < 200 && re * re + im * im < 4.0) {
                double new_re = re * re - im * im + c_re;
                im = 2.0 * re * im + c_im;
                re = new_re;
                turn++;
            }
            inside += (uint64_t)turn;
        }
    }
    show(inside);
    return 0;
}
